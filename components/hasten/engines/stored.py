"""Files of a compiled model, as they are or compressed without loss, so that zeros among the weights save bytes.

A compressed file is a gzip stream of four parts: a line of JSON, `{"size": ..., "floats": [[offset, words], ...]}`,
which says how large the file was and where 32-bit floats lie in it; one bit for each of those floats, 1 where it is not
zero; the floats that are not zero, all their first bytes, then all their second ones and so on; every other byte of the
file. Zeros so cost a bit at most and less where they cluster, and the bytes with the exponents, which resemble one
another, stand together.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError

_PACKED, _PLAIN = ".packed.gz", ".gz"
"""Endings of compressed files: as above, and of the file as it was, which hasten 0.1 wrote."""
_LEVEL = 6
"""Of zlib. On a ResNet-56 lzma makes the parts 1 to 5 % smaller, and takes three to six times as long to read."""
_WORD = np.dtype("<u4")
_MIN_WORDS = 16
"""Fewer floats than that are not worth their place in the list."""

_Segments = Sequence[tuple[int, int]]
"""Offset in bytes and number of floats, in order and without overlap."""


def check_mapped(mapped: bool, compressed: bool) -> None:
    """Raises ConfigError where an engine is to map weights into memory that lie compressed."""
    if mapped and compressed:
        raise ConfigError(
            "mapped must be false where the graph lies compressed, got true (engine.mapped, engine.compressed)"
        )


def store(source: Path, file: Path, compressed: bool) -> None:
    """Copies a file, or writes it compressed beside where it would lie, as `<name>.packed.gz`; the same bytes every
    time."""
    if compressed:
        packed = _pack(source.read_bytes(), _floats(source))
        file.with_name(f"{file.name}{_PACKED}").write_bytes(gzip.compress(packed, _LEVEL, mtime=0))
    else:
        shutil.copyfile(source, file)


def read(file: Path) -> bytes:
    """What was stored compressed as `file`."""
    packed = file.with_name(f"{file.name}{_PACKED}")
    if packed.is_file():
        return _unpack(gzip.decompress(packed.read_bytes()))
    return gzip.decompress(file.with_name(f"{file.name}{_PLAIN}").read_bytes())


@contextmanager
def unpacked(folder: Path, compressed: bool) -> Iterator[Path]:
    """A folder, for as long as the context lasts, in which every file lies as it was before it was stored."""
    if not compressed:
        yield folder
        return
    with TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            name = file.name.removesuffix(_PACKED).removesuffix(_PLAIN)
            if name != file.name:
                Path(scratch, name).write_bytes(read(folder / name))
            elif file.is_file():
                shutil.copyfile(file, Path(scratch, name))
        yield Path(scratch)


def _pack(content: bytes, floats: _Segments) -> bytes:
    data = np.frombuffer(content, np.uint8)
    words = _joined(data[start:end] for start, end in _spans(floats)).view(_WORD)
    others = _joined(data[start:end] for start, end in _gaps(floats, len(data)))
    nonzero = words != 0
    planes = words[nonzero].view(np.uint8).reshape(-1, 4).T
    header = json.dumps({"size": len(data), "floats": floats}) + "\n"
    return b"".join((header.encode(), np.packbits(nonzero).tobytes(), planes.tobytes(), others.tobytes()))


def _unpack(packed: bytes) -> bytes:
    header, _, parts = packed.partition(b"\n")
    layout = json.loads(header)
    size, floats = layout["size"], layout["floats"]
    num_words = sum(words for _, words in floats)
    bits, rest = np.split(np.frombuffer(parts, np.uint8), [-(-num_words // 8)])
    nonzero = np.unpackbits(bits, count=num_words).astype(bool)
    planes, others = np.split(rest, [4 * int(nonzero.sum())])
    words = np.zeros(num_words, _WORD)
    words[nonzero] = np.ascontiguousarray(planes.reshape(4, -1).T).view(_WORD)[:, 0]
    data = np.empty(size, np.uint8)
    for spans, source in ((_spans(floats), words.view(np.uint8)), (_gaps(floats, size), others)):
        taken = 0
        for start, end in spans:
            data[start:end] = source[taken : taken + end - start]
            taken += end - start
    return data.tobytes()


def _joined(parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate([np.empty(0, np.uint8), *parts])


def _spans(floats: _Segments) -> Iterator[tuple[int, int]]:
    """First byte of each segment, and the one behind its last."""
    for offset, words in floats:
        yield offset, offset + 4 * words


def _gaps(floats: _Segments, size: int) -> Iterator[tuple[int, int]]:
    """The same of what lies before, between and behind the segments of a file of that size."""
    reached = 0
    for start, end in _spans(floats):
        yield reached, start
        reached = end
    yield reached, size


def _floats(file: Path) -> list[tuple[int, int]]:
    """Where the float tensors of an ONNX or safetensors file lie; none in files of other kinds."""
    found = {".onnx": _floats_of_onnx, ".safetensors": _floats_of_safetensors}.get(file.suffix, lambda _: iter(()))
    return [(offset, words) for offset, words in found(file) if words >= _MIN_WORDS]


def _floats_of_onnx(file: Path) -> Iterator[tuple[int, int]]:
    import onnx

    content, end = file.read_bytes(), 0
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            # In the order of the file. The same bytes earlier than the tensor would do as well: it is all undone.
            offset = content.find(tensor.raw_data, end)
            if offset >= 0:
                yield offset, len(tensor.raw_data) // 4
                end = offset + len(tensor.raw_data)


def _floats_of_safetensors(file: Path) -> Iterator[tuple[int, int]]:
    """The file begins with the length of its header, 8 bytes; offsets count from behind the header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__" and tensor["dtype"] == "F32"]
    for start, end in sorted(tensor["data_offsets"] for tensor in tensors):
        yield 8 + length + start, (end - start) // 4
