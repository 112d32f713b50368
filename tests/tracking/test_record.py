"""Names and values that MLflow takes, whatever users type."""

from __future__ import annotations

import posixpath
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.tracking import record
from hasten.tracking.credentials import without_credentials


@given(st.text(max_size=400))
def test_every_key_is_one_that_mlflow_accepts(name: str) -> None:
    key = record.key(name)
    assert re.fullmatch(r"[/\w.\- :]+", key)
    assert 0 < len(key) <= 250
    assert posixpath.normpath(key) == key
    assert not key.startswith(("/", ".."))


@pytest.mark.parametrize("name", ["pruning.sparsity", "val/accuracy", "engine", "a-b_c:d e"])
def test_leaves_ordinary_names_alone(name: str) -> None:
    assert record.key(name) == name


@given(user=st.text("abc/:@", min_size=1).map(lambda text: text.replace("/", "%2F")))
def test_hides_whatever_stands_before_the_host(user: str) -> None:
    assert without_credentials(f"uri=postgresql://{user}@db:5432/runs?x=1") == "uri=postgresql://***@db:5432/runs?x=1"


def test_leaves_urls_without_a_user_alone() -> None:
    text = "see http://server:5000/#/experiments and write to me@example.org"
    assert without_credentials(text) == text
