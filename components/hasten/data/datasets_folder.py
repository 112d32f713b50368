"""Folders that Hugging Face's `datasets` wrote, read without it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource, RowStream, Table
from hasten.data.arrow import File, Format, Reading, told_classes
from hasten.data.parts import SPELLINGS, SPLITS, Parts, parts, spelt

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
"""Rows that are Python objects at once, besides those that are kept."""


@dataclass(frozen=True, kw_only=True)
class HfDatasets(DataSource):
    """A folder by `save_to_disk` of a Dataset, or of a DatasetDict with its splits; columns are read as by `Parquet`.

    Attributes:
        path: the folder.
        train, validate, test: names of the folder's splits; None for the usual ones (validation, valid, val and dev are
            validate). Where two are the same, its rows are divided between the two in proportion to `data.split`; a
            split that the folder lacks shares the rows of the one before it.
        inputs: columns; None for all but the targets.
        targets: the column of labels or values; a list of columns of numbers; None for rows without labels.
        limit: rows of each `.arrow` file at most, from its first; None for all.
        nulls: `error`, or `drop` to leave out rows with a null (or NaN) in one of these columns.
    """

    path: str
    train: str | None = None
    validate: str | None = None
    test: str | None = None
    inputs: tuple[str, ...] | None = None
    targets: str | tuple[str, ...] | None = "label"
    limit: Annotated[int, Ge(1)] | None = None
    nulls: Literal["error", "drop"] = "error"

    def fingerprint(self) -> str:
        return self._reading().fingerprint()

    def load(self) -> Table:
        return self._reading().load()

    def stream(self) -> RowStream:
        return self._reading().stream()

    def _reading(self) -> Reading:
        folder = Path(self.path)
        if not folder.exists():
            raise ConfigError(
                f"data.path={self.path} does not exist; what is on the Hub is saved first: "
                "datasets.load_dataset(...).save_to_disk(path)"
            )
        if (folder / "dataset_dict.json").is_file():
            folders, divided, notes = self._splits(folder)
        else:
            if given := [split for split in SPLITS if getattr(self, split) is not None]:
                keys = ", ".join(f"data.{split}={getattr(self, split)}" for split in given)
                raise ConfigError(f"{keys}: {self.path} is one Dataset without splits")
            folders, divided, notes = {"train": folder}, Parts(texts={"train": "+".join(SPLITS)}, notes=()), ()
        return Reading(
            files={text: _files(folders[split]) for split, text in divided.texts.items()},
            format=Format(name="Arrow stream file", schema=_schema, num_rows=_num_rows, batches=_batches),
            parts=divided,
            inputs=self.inputs,
            targets=self.targets,
            limit=self.limit,
            nulls=self.nulls,
            notes=(*notes, *self._classes(folders["train"])),
        )

    def _splits(self, folder: Path) -> tuple[dict[str, Path], Parts, tuple[str, ...]]:
        there = [str(name) for name in _read(folder / "dataset_dict.json").get("splits", ())]
        chosen = spelt(there) | {split: name for split in SPLITS if (name := getattr(self, split)) is not None}
        for split, name in chosen.items():
            if name not in there:
                raise ConfigError(f"data.{split}={name} is no split of {self.path}, which has {', '.join(there)}")
        if "train" not in chosen:
            usual = " or ".join(SPELLINGS["train"])
            raise ConfigError(f"data.train is missing: {self.path} has {', '.join(there)}, of which none is {usual}")
        left = [name for name in there if name not in chosen.values()]
        notes = (f"Splits of {self.path} that are not read: {', '.join(left)}.",) if left else ()
        return {split: folder / name for split, name in chosen.items()}, parts(chosen), notes

    def _classes(self, folder: Path) -> Iterator[str]:
        info = folder / "dataset_info.json"
        features = (_read(info).get("features") if info.is_file() else None) or {}
        if isinstance(self.targets, str):
            feature = features.get(self.targets)
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
                yield f"Classes of {self.targets}: {told_classes(feature.get('names') or ())}."


def _files(folder: Path) -> tuple[File, ...]:
    state = folder / "state.json"
    if not state.is_file():
        raise ConfigError(f"data.path: {folder} is no folder by save_to_disk: it has no state.json")
    names = [str(each["filename"]) for each in _read(state).get("_data_files", ())]
    if not names:
        raise ConfigError(f"data.path: {state} names no file of rows")
    return tuple(File(path=folder / name, key="data.path") for name in names)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.path: {file} is not readable JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"data.path: {file} holds no JSON object")
    return content


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def _num_rows(file: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return sum(batch.num_rows for batch in reader)


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            chosen = batch.select(list(columns))
            for start in range(0, chosen.num_rows, _BATCH_ROWS):
                yield chosen.slice(start, _BATCH_ROWS)
