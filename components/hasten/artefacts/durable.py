"""Files of tensors and plain data that are whole, or are known not to be."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import HastenError

KEPT = 2
"""Checkpoints of a training that are kept: the latest, and one to go back to."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def write(content: Mapping[str, Any], file: Path) -> None:
    """Writes under another name first, with its SHA-256 in front, and renames it when it is on disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as stream:
        stream.write(hashlib.sha256(buffer.getbuffer()).digest())
        stream.write(buffer.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def read(file: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Tensors and plain data; nothing else is ever made of it.

    Raises:
        HastenError: the file is torn or altered.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        raise HastenError(f"checkpoint {file} is torn: its SHA-256 does not match")
    stream = io.BytesIO(content[_DIGEST_BYTES:])
    checkpoint: dict[str, Any] = torch.load(stream, map_location=map_location, weights_only=True)
    return checkpoint
