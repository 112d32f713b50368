"""Signatures as data."""

from __future__ import annotations

import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from hasten.core.interfaces import Input, Signature

INPUTS = st.builds(
    Input,
    name=st.text(min_size=1),
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "int64"]),
    dynamic=st.sets(st.integers(0, 3)).map(sorted).map(tuple),
)


@given(st.lists(INPUTS, min_size=1, max_size=4), st.lists(st.integers(1, 9), max_size=3))
def test_a_signature_survives_json(inputs: list[Input], output_shape: list[int]) -> None:
    signature = Signature(inputs=tuple(inputs), output_shape=tuple(output_shape))
    assert Signature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature
    assert signature.names == tuple(each.name for each in inputs)


def test_interfaces_cost_no_heavy_library() -> None:
    code = (
        "import sys, hasten.core.interfaces\n"
        "heavy = {'torch', 'numpy', 'hydra', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
