"""How fast the rows of CIFAR-10 reach a training: a usual Dataset, litdata, tensors in memory and hasten.

    .venv/bin/python benchmarks/loading.py cifar10_train.parquet

One epoch is every row once, in a random order, in batches of 128: float32 tensors (128, 3, 32, 32), normalised, and
int64 labels, for no model. Every contender is a process of its own that has imported what it needs, with the same
allocator; all stay alive and take turns, in another order each round, so that what disturbs the machine disturbs all.
Worker processes that a contender starts are part of its time wherever it starts them. Before that each has gone through
one epoch that is not timed, in which the pixels that it gives are compared with the others'. The rows of all stay in
the page cache: what is compared is work, not disks.

Prints a Markdown table: medians over the rounds with 95 % intervals, by bootstrap over rounds, of samples per second
and of the ratio to the fastest of the usual ways, and below it whether hasten keeps its bounds. litdata is left out
where it is not installed: `pip install --no-deps litdata`, and then boto3, obstore and tifffile, for what it requires
brings another torch along.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hasten.core.interpreter import import_path, private_channel
from hasten.core.preflight import check
from hasten.core.recipe import Composer, Recipe
from hasten.core.store import Store
from hasten.data.prepare import read
from hasten.evidence.process import serving_environment
from hasten.notebook import composing
from hasten.stages.data import Data, forget_fingerprints
from hasten.stages.stage import Tools
from hasten.stages.training import training_rows
from hasten.training.batches import Batches
from hasten.training.cache import cached
from hasten.training.loading import BatchLoader
from hasten.training.sampler import ResumableBatches

BATCH_SIZE = 128
MEAN, STD = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)
"""Of each colour over the training rows of CIFAR-10, of 255."""
RESAMPLES = 2000
MIN_GAIN = 5.0
"""Samples per second of hasten's epochs after the first, as a multiple of the fastest usual way's."""
MAX_FIRST = 1.3
"""Time of hasten's first epoch with preparation, as a multiple of an epoch of the fastest usual way."""

Batch: TypeAlias = tuple[Tensor, Tensor]
Epoch: TypeAlias = Callable[[], Iterator[Batch]]
"""Begins an epoch: pixels (B, 3, 32, 32) float32 and labels (B,) int64."""


class Source(NamedTuple):
    """The Parquet file, with columns image (encoded) and label, and a folder for whatever a contender writes.

    Attributes:
        limit: rows that count, from the first; None for all.
    """

    file: Path
    folder: Path
    limit: int | None

    def columns(self) -> tuple[list[bytes], list[int]]:
        from pyarrow.parquet import read_table

        table = read_table(self.file, columns=["image", "label"]).slice(0, self.limit)
        return table["image"].to_pylist(), table["label"].to_pylist()


class Images(Dataset[tuple[Tensor, int]]):
    """A usual data set: an image is decoded and normalised whenever it is asked for."""

    def __init__(self, images: Sequence[bytes], labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels
        self.mean = torch.tensor(MEAN).div(255).view(3, 1, 1)
        self.std = torch.tensor(STD).div(255).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        # ToTensor and Normalize of torchvision, which most write here, do just this.
        pixels = torch.from_numpy(_decoded(self.images[row])).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(self.mean).div_(self.std), self.labels[row]


def usual(source: Source, workers: int) -> Epoch:
    batches = DataLoader(
        Images(*source.columns()),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(batches)


def litdata(source: Source) -> Epoch:
    _optimize(source, source.folder)
    return _streamed(source.folder)


def litdata_first(source: Source) -> Epoch:
    """Chunks are made anew for every epoch."""
    import litdata  # noqa: F401  # not timed, as no import is

    def epoch() -> Iterator[Batch]:
        with tempfile.TemporaryDirectory(dir=source.folder) as chunks:
            _optimize(source, Path(chunks))
            yield from _streamed(Path(chunks))()

    return epoch


def _optimize(source: Source, folder: Path) -> None:
    """Decoded pixels in chunks of litdata's documented size, in a process for each CPU."""
    from litdata import optimize

    optimize(
        fn=_sample,
        inputs=list(zip(*source.columns(), strict=True)),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=len(os.sched_getaffinity(0)),
        verbose=False,
    )


def _sample(row: tuple[bytes, int]) -> dict[str, Any]:
    image, label = row
    return {"image": np.ascontiguousarray(_decoded(image).transpose(2, 0, 1)), "label": label}


def _streamed(folder: Path) -> Epoch:
    """As it is fastest for rows as small as these: in the training's process, normalised by the batch."""
    from litdata import StreamingDataLoader, StreamingDataset

    batches = StreamingDataLoader(StreamingDataset(str(folder), shuffle=True, drop_last=False), batch_size=BATCH_SIZE)
    return lambda: ((_normalised(batch["image"]), batch["label"]) for batch in batches)


def tensors(source: Source) -> Epoch:
    """A batch is one gather out of float32 tensors: what no loader can be faster than."""
    pixels, labels = _tensors(source)

    def epoch() -> Iterator[Batch]:
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            yield pixels[rows], labels[rows]

    return epoch


def tensor_dataset(source: Source) -> Epoch:
    batches = DataLoader(TensorDataset(*_tensors(source)), batch_size=BATCH_SIZE, shuffle=True)
    return lambda: iter(batches)


def _tensors(source: Source) -> Batch:
    images, labels = source.columns()
    pixels = torch.from_numpy(np.stack([_decoded(image) for image in images])).permute(0, 3, 1, 2)
    return _normalised(pixels).contiguous(), torch.tensor(labels)


def _normalised(pixels: Tensor) -> Tensor:
    """(B, 3, height, width) of 0 to 255."""
    return pixels.float().sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def hasten(source: Source, cache: str) -> Epoch:
    return _loaded(_recipe(source, cache), source.folder)


def hasten_first(source: Source) -> Epoch:
    """The rows are read and prepared anew for every epoch, and loaded as by default."""
    recipe = _recipe(source, "auto")

    def epoch() -> Iterator[Batch]:
        with tempfile.TemporaryDirectory(dir=source.folder) as store:
            forget_fingerprints()
            yield from _loaded(recipe, Path(store))()

    return epoch


def _recipe(source: Source, cache: str) -> Recipe:
    """All rows are trained on, but for one of each class in the other splits, which may not be empty."""
    mean, std = (f"{{image: {list(values)}}}" for values in (MEAN, STD))
    with composing():
        recipe = Composer.of(
            [
                "data=parquet",
                f"data.path={source.file.absolute()}",
                f"data.limit={'null' if source.limit is None else source.limit}",
                "data.split={train: 0.9998, validate: 0.0001, test: 0.0001}",
                "data.transforms=[{_target_: hasten.data.transforms.DecodeImage, column: image, size: [32, 32]}, "
                f"{{_target_: hasten.data.transforms.Standardize, mean: {mean}, std: {std}}}]",
                "data.normalize=false",
                f"loader.cache={cache}",
            ]
        ).compose()
    check(recipe)
    return recipe


def _loaded(recipe: Recipe, store: Path) -> Epoch:
    """What the stages that train do with a recipe until a step has its batch."""
    entry = Store(store).build(Data().ingredients(recipe, {}), lambda folder: Data().make(recipe, {}, folder, Tools()))
    rows, settled = training_rows(recipe, read(entry.folder))
    rows, _ = cached(rows, settled.cache)
    epochs = itertools.count()

    def epoch() -> Iterator[Batch]:
        number = next(epochs)
        order = ResumableBatches(len(rows), BATCH_SIZE, 0, lambda: (number, 0))
        with BatchLoader(Batches(rows), order, settled, pin=False) as batches:
            yield from batches

    return epoch


def _decoded(image: bytes) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    from PIL import Image

    return np.array(Image.open(io.BytesIO(image)).convert("RGB"))


USUAL: Mapping[str, Callable[[Source], Epoch]] = {
    "Dataset + DataLoader, decodes at every access": lambda source: usual(source, 0),
    "the same, 1 worker": lambda source: usual(source, 1),
    "the same, 2 workers": lambda source: usual(source, 2),
}
FIRST = "hasten, first epoch with preparation"
AFTERWARDS: Mapping[str, Callable[[Source], Epoch]] = {
    "hasten, loader.cache=disk": lambda source: hasten(source, "disk"),
    "hasten, loader.cache=memory": lambda source: hasten(source, "memory"),
}
CONTENDERS: Mapping[str, Callable[[Source], Epoch]] = {
    **USUAL,
    "litdata, first epoch with optimize": litdata_first,
    "litdata": litdata,
    "TensorDataset + DataLoader": tensor_dataset,
    "float32 tensors in memory, indexed by batch": tensors,
    FIRST: hasten_first,
    **AFTERWARDS,
}


class Content(NamedTuple):
    """What an epoch gave."""

    num_rows: int
    mean: float
    std: float

    def agrees(self, other: Content) -> bool:
        """Up to the few rows that a split needs for itself, or that make no whole batch."""
        left_out = abs(self.num_rows - other.num_rows)
        return left_out < 2 * BATCH_SIZE and np.allclose(self[1:], other[1:], rtol=0, atol=5e-3)


def serve(name: str, source: Source) -> None:
    """A contender's process: answers every line that comes in."""
    requests, answers = private_channel()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    torch.manual_seed(0)
    try:
        epoch = CONTENDERS[name](source)
    except ImportError as error:
        answer(f"{error.name} is not installed: pip install {error.name}")
        return
    answer(_content(epoch))
    for _ in requests:
        answer(_timed(epoch))


def _content(epoch: Epoch) -> Content:
    num_rows, num_values, total, squares = 0, 0, 0.0, 0.0
    for pixels, labels in epoch():
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        num_rows, num_values = num_rows + len(labels), num_values + pixels.numel()
        total, squares = total + pixels.double().sum().item(), squares + pixels.double().square().sum().item()
    mean = total / num_values
    return Content(num_rows, mean, (squares / num_values - mean**2) ** 0.5)


def _timed(epoch: Epoch) -> tuple[int, float]:
    """Rows, and seconds until the last of them was there: what an epoch clears up behind it is not counted."""
    start = end = time.perf_counter()
    num_rows = 0
    for pixels, _ in epoch():
        num_rows += len(pixels)
        end = time.perf_counter()
    return num_rows, end - start


class Contender:
    """The parent's side of a contender, for the length of a `with` block."""

    def __init__(self, name: str, source: Source, threads: int) -> None:
        self.name = name
        source.folder.mkdir()
        limited = [] if source.limit is None else ["--limit", str(source.limit)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", __file__, str(source.file), *limited),
                *("--serve", name, "--folder", str(source.folder)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **serving_environment(threads), "PYTHONPATH": import_path()},
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def content(self) -> Content | str:
        """Of the first epoch, or why there is none."""
        answer = self._answer()
        return answer if isinstance(answer, str) else Content(*answer)

    def samples_per_second(self) -> float:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        num_rows, seconds = self._answer()
        return float(num_rows / seconds)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process has ended with code {self._process.wait()}")
        return json.loads(line)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def told(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def medians(rates: NDArray[np.float64], others: NDArray[np.float64] | None = None) -> Estimate:
    """Median over rounds (rounds,), or the ratio of two that took turns: both are drawn from the same rounds."""

    def statistic(rows: NDArray[Any]) -> NDArray[np.float64]:
        below = 1.0 if others is None else np.median(others[rows], axis=-1)
        return np.asarray(np.median(rates[rows], axis=-1) / below)

    drawn = np.random.default_rng(0).integers(len(rates), size=(RESAMPLES, len(rates)))
    low, high = np.quantile(statistic(drawn), (0.025, 0.975))
    return Estimate(value=float(statistic(np.arange(len(rates)))), low=float(low), high=float(high))


def main(arguments: Sequence[str]) -> None:
    parsed = _parsed(arguments)
    if parsed.serve:
        serve(parsed.serve, Source(parsed.file, parsed.folder, parsed.limit))
        return
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hasten-")))
        contenders = list(_running(stack, parsed, scratch))
        rates: dict[str, list[float]] = {each.name: [] for each in contenders}
        shuffle = random.Random(0).shuffle
        for _ in range(parsed.rounds):
            shuffle(contenders)
            for each in contenders:
                rates[each.name].append(each.samples_per_second())
    _print_table({name: np.array(rates[name]) for name in CONTENDERS if name in rates})


def _running(stack: ExitStack, parsed: argparse.Namespace, scratch: Path) -> Iterator[Contender]:
    """Those that can be started, each after an epoch in which it gave what the first gave."""
    first = None
    for number, name in enumerate(CONTENDERS):
        source = Source(parsed.file, scratch / str(number), parsed.limit)
        contender = stack.enter_context(Contender(name, source, threads=len(os.sched_getaffinity(0))))
        content = contender.content()
        if isinstance(content, str):
            print(f"{name} is left out: {content}\n", flush=True)
            continue
        first = first or content
        if not content.agrees(first):
            raise SystemExit(f"{name} gives other rows than the first: {content}, not {first}")
        yield contender


def _print_table(rates: Mapping[str, NDArray[np.float64]]) -> None:
    best = max(USUAL, key=lambda name: float(np.median(rates[name])))
    print(f"| contender | samples/s | times {best} |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {medians(values).told(',.0f')} | {medians(values, rates[best]).told('.2f')} |")
    gain = min((medians(rates[name], rates[best]) for name in AFTERWARDS), key=lambda estimate: estimate.value)
    first = medians(rates[best], rates[FIRST])
    print(
        f"\nEpochs after the first: {gain.told('.2f')} times the samples per second of the fastest usual way, "
        f"{_verdict(gain.value >= MIN_GAIN, f'at least {MIN_GAIN:g}')}. The first, with preparation: "
        f"{first.told('.2f')} times its time, {_verdict(first.value <= MAX_FIRST, f'at most {MAX_FIRST:g}')}."
    )


def _verdict(holds: bool, bound: str) -> str:
    return bound if holds else f"NOT {bound}"


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="Parquet with columns image (encoded) and label")
    parser.add_argument("--rounds", type=int, default=7, help="in which all take turns")
    parser.add_argument("--limit", type=int, help="rows, from the first; default: all")
    parser.add_argument("--serve", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
