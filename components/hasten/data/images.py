"""Folders of images."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource, Table
from hasten.data.arrow import told, told_classes
from hasten.data.parts import SPLITS, Parts, parts, spelt

COLUMN = "image"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DataSource):
    """Images in one folder a class, `path/<class>/*.png`, or with splits of their own, `path/train/<class>/*.png`.

    The column `image` holds the bytes of each file; labels number the classes in the order of their names. Images may
    lie in folders below that of their class. Splits are there where the folder `train` holds folders and no image:
    train, validate (or validation, valid, val, dev) and test; a split without a folder shares the images of the one
    before it.

    Attributes:
        path: the folder.
        classes: folders of classes to read; None for all.
        limit: images of each class (and split) at most, in the order of their names; None for all.
    """

    path: str
    classes: tuple[str, ...] | None = None
    limit: Annotated[int, Ge(1)] | None = None

    def fingerprint(self) -> str:
        divided, _, files = self._files()
        digest = hashlib.sha256()
        for split, text in divided.texts.items():
            for name, images in files[split].items():
                for image in images:
                    content = _content(image)
                    digest.update(f"{text!r} {name!r} {len(content)}\n".encode())
                    digest.update(content)
        return digest.hexdigest()

    def load(self) -> Table:
        divided, notes, files = self._files()
        classes = sorted({name for split in divided.texts for name in files[split]})
        contents: list[bytes] = []
        labels: list[int] = []
        rows: list[tuple[str, int]] = []
        broken: list[str] = []
        sizes: list[tuple[str, tuple[int, int]]] = []
        for split, text in divided.texts.items():
            before = len(contents)
            for name, images in files[split].items():
                for image in images:
                    content = _content(image)
                    size = _size(content)
                    if size is None:
                        broken.append(str(image.relative_to(self.path)))
                        continue
                    sizes.append((str(image.relative_to(self.path)), size))
                    contents.append(content)
                    labels.append(classes.index(name))
            rows.append((text, len(contents) - before))
        self._check_classes(classes, labels, broken)
        notes = [
            f"Classes by their folders: {told_classes(classes)}.",
            *divided.notes,
            *notes,
            *_notes(broken, sizes),
        ]
        return Table(
            inputs={COLUMN: np.array([*contents, None], dtype=object)[:-1]},
            targets=np.array(labels, dtype=np.int64),
            parts=divided.column(rows),
            notes=tuple(notes),
        )

    def _files(self) -> tuple[Parts, list[str], dict[str, dict[str, list[Path]]]]:
        """Parts, what to tell of the folders, and the images: split -> class -> files in the order of their names."""
        folder = Path(self.path)
        if not folder.is_dir():
            reason = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ConfigError(f"data.path={self.path} {reason}: images lie in data.path/<class>/*.png")
        names = _folders(folder)
        if not _has_splits(folder):
            files = {"train": self._classes_of(folder)}
            return Parts(texts={"train": "+".join(SPLITS)}, notes=()), [], files
        splits = spelt(names)
        files = {split: self._classes_of(folder / name) for split, name in splits.items()}
        for split, found in files.items():
            if unknown := sorted(set(found) - set(files["train"])):
                raise ConfigError(
                    f"data.path: {folder / splits[split]} has classes that {folder / splits['train']} has not: "
                    f"{told(unknown)}"
                )
        left = [name for name in names if name not in splits.values()]
        notes = [f"Folders of {self.path} that are not read: {told(left)}."] if left else []
        return parts({split: split for split in splits}), notes, files

    def _classes_of(self, folder: Path) -> dict[str, list[Path]]:
        there = {name: images for name in _folders(folder) if (images := _images(folder / name))}
        for name in self.classes or ():
            if name not in there:
                held = told(list(there)) or "none"
                raise ConfigError(f"data.classes={name} is no folder with images in {folder}, which has {held}")
        if not there:
            raise ConfigError(
                f"data.path: {folder} holds no folders with images: data.path/<class>/*.png ({', '.join(SUFFIXES)})"
            )
        return {
            name: images[: self.limit] for name, images in there.items() if self.classes is None or name in self.classes
        }

    def _check_classes(self, classes: Sequence[str], labels: Sequence[int], broken: Sequence[str]) -> None:
        counts = dict(zip(classes, np.bincount(labels, minlength=len(classes)), strict=True))
        if empty := [name for name, count in counts.items() if not count]:
            raise ConfigError(
                f"data.path={self.path}: no image of {told(empty)} can be decoded; broken: {told(broken)}"
            )
        if len(classes) < 2:
            raise ConfigError(f"data.path={self.path} has the one class {classes[0]}: at least 2 are needed")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    # Names that start with a dot: macOS leaves `._cat.png`, which is no image, beside cat.png.
    found = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def _has_splits(folder: Path) -> bool:
    train = next((folder / name for name in ("train", "training") if (folder / name).is_dir()), None)
    if train is None or not _folders(train):
        return False
    return not any(file.suffix.lower() in SUFFIXES for file in train.iterdir() if file.is_file())


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.path: {file} can't be read: {error}") from error


def _size(content: bytes) -> tuple[int, int] | None:
    """Width and height; None for what Pillow can't decode to its last pixel."""
    from PIL import Image

    # What Pillow's decoders raise on broken files, by its documentation and by the formats above.
    broken = (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        struct.error,
        Image.DecompressionBombError,
    )
    with warnings.catch_warnings():
        # Of odd metadata and large images: the pixels are there, or decoding fails.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return image.size
        except broken:
            return None


def _notes(broken: Sequence[str], sizes: Sequence[tuple[str, tuple[int, int]]]) -> list[str]:
    notes = []
    if broken:
        notes.append(
            f"{len(broken)} of {len(broken) + len(sizes)} images can't be decoded and were left out: {told(broken)}."
        )
    counts = Counter(size for _, size in sizes)
    (width, height), common = counts.most_common(1)[0]
    if common < len(sizes):
        odd = [f"{name} ({wide}x{high})" for name, (wide, high) in sizes if (wide, high) != (width, height)]
        notes.append(
            f"{len(odd)} of {len(sizes)} images are not {width}x{height} pixels as most are, and are resized when they "
            f"are decoded: {told(odd)}."
        )
    return notes
