"""Folders that Hugging Face's datasets wrote, made here as it lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hasten.core.errors import ConfigError
from hasten.data.datasets_folder import HfDatasets

CLASSES = {"label": {"names": ["negative", "positive"], "_type": "ClassLabel"}}


def rows(first: int, count: int) -> pa.Table:
    numbers = np.arange(first, first + count)
    return pa.table({"text": [f"row {number}" for number in numbers], "label": numbers % 2})


def dataset(folder: Path, table: pa.Table, *, files: int = 1, batch: int = 1000, features=CLASSES) -> Path:
    """As `Dataset.save_to_disk`: Arrow streams, their list in state.json, features in dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    size = -(-len(table) // files)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(number * size, size), max_chunksize=batch)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def datasets(folder: Path, splits: dict[str, int]) -> Path:
    """As `DatasetDict.save_to_disk`; `splits`: name -> rows."""
    first = 0
    for name, count in splits.items():
        dataset(folder / name, rows(first, count))
        first += count
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def test_reads_a_dataset_and_tells_its_classes(tmp_path):
    table = HfDatasets(path=str(dataset(tmp_path / "reviews", rows(0, 10)))).load()
    assert table.inputs["text"].tolist() == [f"row {number}" for number in range(10)]
    assert table.targets.tolist() == [0, 1] * 5
    assert (table.parts, table.notes) == (None, ("Classes of label: 0 negative, 1 positive.",))


def test_reads_the_files_in_the_order_of_the_state(tmp_path):
    folder = dataset(tmp_path / "reviews", rows(0, 10), files=3)
    assert HfDatasets(path=str(folder)).load().inputs["text"].tolist() == [f"row {number}" for number in range(10)]


def test_the_splits_of_a_dict_give_parts(tmp_path):
    folder = datasets(tmp_path / "reviews", {"test": 2, "train": 6, "validation": 3, "unsupervised": 5})
    table = HfDatasets(path=str(folder)).load()
    assert table.parts.tolist() == ["train"] * 6 + ["validate"] * 3 + ["test"] * 2
    assert table.inputs["text"][:2].tolist() == ["row 2", "row 3"]
    assert table.notes[0].endswith("reviews that are not read: unsupervised.")


@pytest.mark.parametrize("name", ["valid", "dev", "val"])
def test_knows_the_names_of_validation(tmp_path, name):
    folder = datasets(tmp_path / "reviews", {"train": 4, name: 2, "test": 2})
    assert HfDatasets(path=str(folder)).load().parts.tolist() == ["train"] * 4 + ["validate"] * 2 + ["test"] * 2


def test_two_splits_may_share_the_rows_of_one(tmp_path):
    folder = datasets(tmp_path / "reviews", {"train": 4, "test": 4})
    assert HfDatasets(path=str(folder), validate="test").load().parts.tolist() == ["train"] * 4 + ["validate+test"] * 4
    table = HfDatasets(path=str(folder)).load()
    assert table.parts.tolist() == ["train+validate"] * 4 + ["test"] * 4
    assert any(note.startswith("There are no rows for validate alone") for note in table.notes)


def test_images_are_their_bytes_and_null_labels_an_error(tmp_path):
    images = pa.array([{"bytes": b"one", "path": "1.png"}, {"bytes": b"two", "path": None}])
    folder = dataset(tmp_path / "pets", pa.table({"image": images, "label": [0, None]}))
    with pytest.raises(
        ConfigError, match=r"^data\.targets=label has 1 null in .*data-00000-of-00001\.arrow, the first in row 1"
    ):
        HfDatasets(path=str(folder)).load()
    assert HfDatasets(path=str(folder), nulls="drop").load().inputs["image"].tolist() == [b"one"]


def test_content_makes_the_fingerprint_and_batches_do_not(tmp_path):
    one = HfDatasets(path=str(dataset(tmp_path / "one", rows(0, 50))))
    two = HfDatasets(path=str(dataset(tmp_path / "two", rows(0, 50), files=4, batch=3)))
    other = HfDatasets(path=str(dataset(tmp_path / "three", rows(1, 50))))
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_the_rows_outlive_the_mapped_file(tmp_path):
    folder = dataset(tmp_path / "numbers", pa.table({"x": np.arange(2000.0), "label": np.arange(2000) % 2}))
    table = HfDatasets(path=str(folder)).load()
    (folder / "data-00000-of-00001.arrow").write_bytes(b"")
    np.testing.assert_array_equal(table.inputs["x"], np.arange(2000.0))


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"path": "nowhere"}, r"data\.path=nowhere does not exist; .*save_to_disk"),
        ({"path": "."}, r"data\.path: \. is no folder by save_to_disk: it has no state\.json"),
        ({"path": "one", "test": "test"}, r"data\.test=test: one is one Dataset without splits"),
        (
            {"path": "one", "targets": "star"},
            r"data\.targets=star is no column of one/data-.*\.arrow; it has text, label",
        ),
        ({"path": "dict", "validate": "dev"}, r"data\.validate=dev is no split of dict, which has train, test"),
        ({"path": "odd"}, r"data\.train is missing: odd has a, b, of which none is train or training"),
        ({"path": "torn"}, r"data\.path: torn/state\.json is not readable JSON"),
        ({"path": "damaged"}, r"data\.path: damaged/data-00000-of-00001\.arrow is not a readable Arrow stream file: "),
        ({"path": "lost"}, r"data\.path: lost/data-00000-of-00001\.arrow is not a readable Arrow stream file: "),
    ],
)
def test_refuses_what_is_no_such_folder(tmp_path, knobs, problem):
    dataset(tmp_path / "one", rows(0, 4))
    datasets(tmp_path / "dict", {"train": 2, "test": 2})
    datasets(tmp_path / "odd", {"a": 2, "b": 2})
    (dataset(tmp_path / "torn", rows(0, 4)) / "state.json").write_text("{")
    (dataset(tmp_path / "damaged", rows(0, 4)) / "data-00000-of-00001.arrow").write_bytes(b"no stream of Arrow")
    (dataset(tmp_path / "lost", rows(0, 4)) / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        HfDatasets(**knobs).load()
