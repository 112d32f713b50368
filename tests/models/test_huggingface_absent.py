"""Models of transformers where it is not installed."""

import sys

import pytest

from hasten.models.huggingface import HuggingFace


def test_says_how_to_get_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'hasten\[transformers\]'"):
        HuggingFace(config={"model_type": "bert"})
