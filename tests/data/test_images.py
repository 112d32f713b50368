"""Folders of images."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hasten.core.errors import ConfigError
from hasten.data.images import ImageFolder


def encoded(seed: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def folder(root: Path, classes: dict[str, int], offset: int = 0) -> Path:
    """`classes`: name -> number of images."""
    for place, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(offset + 1000 * place + number))
    return root


def test_holds_the_bytes_of_each_file_and_the_number_of_its_class(tmp_path):
    root = folder(tmp_path / "pets", {"dog": 3, "cat": 2})
    table = ImageFolder(path=str(root)).load()
    images = table.inputs["image"]
    assert list(table.inputs) == ["image"]
    assert (images.dtype, images.shape) == (object, (5,))
    assert images.tolist() == [
        (root / name).read_bytes() for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png")
    ]
    assert table.targets.tolist() == [0, 0, 1, 1, 1]
    assert (table.targets.dtype, table.parts) == (np.int64, None)
    assert table.notes == ("Classes by their folders: 0 cat, 1 dog.",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "JPEG"),
        ("a.JPEG", "JPEG"),
        ("a.bmp", "BMP"),
        ("a.gif", "GIF"),
        ("a.webp", "WEBP"),
        ("deep/er/a.png", "PNG"),
    ],
)
def test_takes_the_usual_formats_at_any_depth(tmp_path, name, kind):
    root = folder(tmp_path / "pets", {"cat": 1, "dog": 1})
    (root / "dog" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "dog" / name).write_bytes(encoded(7, kind=kind))
    assert ImageFolder(path=str(root)).load().targets.tolist() == [0, 1, 1]


def test_what_is_no_image_by_name_or_hidden_is_left_alone(tmp_path):
    root = folder(tmp_path / "pets", {"cat": 1, "dog": 1})
    for name in ("._0.png", ".DS_Store", "readme.txt"):
        (root / "cat" / name).write_bytes(b"nothing")
    (root / ".git").mkdir()
    (root / ".git" / "a.png").write_bytes(encoded(9))
    table = ImageFolder(path=str(root)).load()
    assert (len(table.targets), len(table.notes)) == (2, 1)


def test_broken_images_are_left_out_and_odd_sizes_told(tmp_path):
    root = folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    whole = encoded(3, (64, 64))
    (root / "cat" / "0.png").write_bytes(b"")
    (root / "cat" / "3.png").write_bytes(b"GIF89a and then nothing")
    (root / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "2.png").write_bytes(encoded(4, (12, 8)))
    (root / "dog" / "5.png").write_bytes(encoded(5, (8, 6)))
    table = ImageFolder(path=str(root)).load()
    assert table.targets.tolist() == [0] * 4 + [1] * 5
    assert len(table.inputs["image"]) == 9
    assert table.notes[1:] == (
        "3 of 12 images can't be decoded and were left out: cat/0.png, cat/3.png, dog/1.png.",
        "2 of 9 images are not 8x8 pixels as most are, and are resized when they are decoded: "
        "cat/2.png (12x8), dog/5.png (8x6).",
    )


def test_of_many_broken_images_the_first_are_named(tmp_path):
    root = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    for number in range(5):
        (root / "dog" / f"b{number}.jpg").write_bytes(b"no")
    assert ImageFolder(path=str(root)).load().notes[1].endswith("dog/b0.jpg, dog/b1.jpg, dog/b2.jpg and 2 more.")


def test_folders_of_splits_give_parts(tmp_path):
    for place, (split, count) in enumerate([("train", 3), ("val", 2), ("test", 1)]):
        folder(tmp_path / "pets" / split, {"cat": count, "dog": 1}, offset=100 * place)
    (tmp_path / "pets" / "raw").mkdir()
    table = ImageFolder(path=str(tmp_path / "pets")).load()
    assert table.parts.tolist() == ["train"] * 4 + ["validate"] * 3 + ["test"] * 2
    assert table.targets.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 1]
    assert table.notes[1].endswith("pets that are not read: raw.")


def test_a_missing_split_shares_the_images_of_the_one_before_it(tmp_path):
    for split in ("train", "test"):
        folder(tmp_path / "pets" / split, {"cat": 1, "dog": 1})
    table = ImageFolder(path=str(tmp_path / "pets")).load()
    assert table.parts.tolist() == ["train+validate"] * 2 + ["test"] * 2
    assert any(note.startswith("There are no rows for validate alone") for note in table.notes)


def test_a_class_may_be_called_train(tmp_path):
    table = ImageFolder(path=str(folder(tmp_path / "vehicles", {"bus": 1, "train": 2}))).load()
    assert (table.targets.tolist(), table.parts) == ([0, 1, 1], None)


def test_reads_the_classes_and_as_many_images_as_the_config_says(tmp_path):
    root = folder(tmp_path / "pets", {"ant": 3, "cat": 1, "dog": 4})
    assert ImageFolder(path=str(root), limit=2).load().targets.tolist() == [0, 0, 1, 2, 2]
    assert ImageFolder(path=str(root), classes=("dog", "cat")).load().targets.tolist() == [0, 1, 1, 1, 1]


def test_the_same_images_elsewhere_have_the_same_fingerprint(tmp_path):
    one = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    shutil.copytree(one, tmp_path / "copy")
    assert ImageFolder(path=str(one)).fingerprint() == ImageFolder(path=str(tmp_path / "copy")).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "cat" / "1.png").write_bytes(encoded(99)),
        lambda root: (root / "cat" / "1.png").unlink(),
        lambda root: (root / "cat").rename(root / "fox"),
        lambda root: (root / "cat" / "1.png").rename(root / "dog" / "00.png"),
    ],
    ids=["an image", "one less", "a class", "another class"],
)
def test_other_images_or_classes_have_another_fingerprint(tmp_path, change):
    root = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    before = ImageFolder(path=str(root)).fingerprint()
    change(root)
    assert ImageFolder(path=str(root)).fingerprint() != before


@pytest.mark.parametrize(
    ("classes", "knobs", "problem"),
    [
        ({}, {"path": "nowhere"}, r"data\.path=nowhere does not exist: images lie in data\.path/<class>/\*\.png"),
        ({}, {"path": "file"}, r"data\.path=file is a file, not a folder"),
        ({"cat": 0, "dog": 0}, {}, r"data\.path: .*pets holds no folders with images"),
        ({"cat": 2}, {}, r"data\.path=.*pets has the one class cat: at least 2 are needed"),
        ({"cat": 2, "dog": 0}, {}, r"data\.path=.*pets has the one class cat"),
        (
            {"cat": 1, "dog": 1},
            {"classes": ("cow",)},
            r"data\.classes=cow is no folder with images in .*, which has cat, dog",
        ),
    ],
)
def test_refuses_what_holds_no_classes_of_images(tmp_path, classes, knobs, problem):
    (tmp_path / "file").write_text("")
    root = folder(tmp_path / "pets", classes)
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        ImageFolder(**({"path": str(root)} | knobs)).load()


def test_refuses_a_class_of_broken_images(tmp_path):
    root = folder(tmp_path / "pets", {"cat": 2, "dog": 1})
    (root / "dog" / "0.png").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"^data\.path=.*: no image of dog can be decoded; broken: dog/0\.png$"):
        ImageFolder(path=str(root)).load()


def test_refuses_a_class_that_is_not_trained_on(tmp_path):
    folder(tmp_path / "pets" / "train", {"cat": 1, "dog": 1})
    folder(tmp_path / "pets" / "test", {"cat": 1, "fox": 1})
    with pytest.raises(ConfigError, match=r"^data\.path: .*test has classes that .*train has not: fox"):
        ImageFolder(path=str(tmp_path / "pets")).load()
