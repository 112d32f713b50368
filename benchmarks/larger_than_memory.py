"""A training on more rows than the memory holds: what it takes, what it reads, and that a kill changes nothing.

    .venv/bin/python benchmarks/larger_than_memory.py
    .venv/bin/python benchmarks/larger_than_memory.py --gigabytes 1 --limit-mib 1024

Makes up rows of numbers in Parquet files, a little at a time, and removes them again. A recipe prepares them and trains
a small network for two epochs: once undisturbed; and once under a memory limit that counts the page cache too (a
control group, which only root may make; else it is said and left out), killed in the middle of the second epoch and
started again. The network notes the numbers of the rows of every step, in the order in which they come. Prints
Markdown: the peak of anonymous memory over all processes of a training, the peak of its control group, seconds, what
the loader read; and whether both trainings saw the same rows and ended with the same weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.artefacts.module import build, save
from hasten.core.errors import HastenError
from hasten.core.files import file_digest, read_json, write_json
from hasten.core.interpreter import import_path
from hasten.core.preflight import check
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.data.prepare import read
from hasten.notebook import composing
from hasten.stages.data import Data
from hasten.stages.stage import Tools
from hasten.stages.training import StageBench

FEATURES = 1536
ROW_BYTES = 4 * FEATURES
GROUP_ROWS = 4096
"""Rows that are made up at once, 25 MB."""
FILE_ROWS = 2**18
EPOCHS = 2
KILLED_AT = 1.4
"""Epochs after which the second training is killed."""
DIE_AT = "HASTEN_DIE_AT_STEP"


class Witness(nn.Module):
    """A small network that notes which rows it is trained on.

    Args:
        input_shape: of the values.
        notes: file to which each training step adds its number, how many rows it has, and their numbers, as int64.
    """

    steps: Tensor

    def __init__(self, *, input_shape: tuple[int, ...], num_outputs: int, notes: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_shape[0], 16), nn.ReLU(), nn.Linear(16, num_outputs))
        self.notes = notes
        # A buffer, so that it is part of every checkpoint: a step that is repeated after a kill has the same number.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, values: Tensor, row: Tensor) -> Tensor:
        if self.training:
            step = int(self.steps)
            with open(self.notes, "ab") as file:
                file.write(np.array([step, len(row), *row.tolist()], dtype=np.int64).tobytes())
            if os.environ.get(DIE_AT) == str(step):
                os.kill(os.getpid(), signal.SIGKILL)
            self.steps += 1
        logits_BC: Tensor = self.layers(values)
        return logits_BC


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a witness noted.

    Attributes:
        rows: step -> numbers of its rows, in their order.
        repeated: steps that were noted twice: again after a kill.
        changed: those of them that had other rows the second time.
    """

    rows: Mapping[int, tuple[int, ...]]
    repeated: tuple[int, ...]
    changed: tuple[int, ...]

    @classmethod
    def of(cls, file: Path) -> Notes:
        numbers = np.fromfile(file, dtype=np.int64) if file.exists() else np.empty(0, np.int64)
        rows: dict[int, tuple[int, ...]] = {}
        repeated, changed = [], []
        place = 0
        while place < len(numbers):
            step, count = (int(number) for number in numbers[place : place + 2])
            mine = tuple(numbers[place + 2 : place + 2 + count].tolist())
            if step in rows:
                repeated.append(step)
                changed += [step] if rows[step] != mine else []
            rows[step] = mine
            place += 2 + count
        return cls(rows=rows, repeated=tuple(repeated), changed=tuple(changed))

    @property
    def seen(self) -> Counter[int]:
        """How often each row was trained on."""
        return Counter(row for rows in self.rows.values() for row in rows)


def generate(folder: Path, num_rows: int) -> None:
    """Rows with their number, values in [0, 1), and whether the first eight of them add up to more than 4."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    folder.mkdir()
    generator = np.random.default_rng(0)
    kind = pa.list_(pa.float32(), FEATURES)
    schema = pa.schema({"values": kind, "row": pa.int64(), "label": pa.int64()})
    for begin in range(0, num_rows, FILE_ROWS):
        end = min(begin + FILE_ROWS, num_rows)
        file = folder / f"rows-{begin // FILE_ROWS:04}.parquet"
        # Noise is not smaller compressed, and every value another one.
        with ParquetWriter(file, schema, compression="none", use_dictionary=False) as parquet:
            for first in range(begin, end, GROUP_ROWS):
                rows = np.arange(first, min(first + GROUP_ROWS, end))
                values = generator.random((len(rows), FEATURES), dtype=np.float32)
                columns = [
                    pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), FEATURES),
                    pa.array(rows),
                    pa.array((values[:, :8].sum(1) > 4).astype(np.int64)),
                ]
                parquet.write_table(pa.table(columns, schema=schema), row_group_size=GROUP_ROWS)
        _drop_from_cache(file)


def _drop_from_cache(file: Path) -> None:
    """A page counts for the control group that first read it: whoever trains shall read these."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the stages `data` and `teacher` do with a recipe, in a store of its own.

    Attributes:
        rows: folder of Parquet files.
        folder: takes the store, the witness' notes and the outcome.
        batch_size: rows of a step.
        checkpoint_seconds: between checkpoints.
        overrides: of the recipe, besides.
    """

    rows: Path
    folder: Path
    batch_size: int
    checkpoint_seconds: float
    overrides: tuple[str, ...] = ()

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def outcome(self) -> Path:
        return self.folder / "outcome.json"

    def recipe(self) -> list[str]:
        """Overrides of the packaged config."""
        return [
            "data=parquet",
            f"data.path={self.rows}",
            "data.inputs=[values,row]",
            "data.split={train: 0.96, validate: 0.02, test: 0.02}",
            "model=custom",
            "model.arch._target_=larger_than_memory.Witness",
            f"+model.arch.notes={self.notes}",
            f"trainer.epochs={EPOCHS}",
            f"trainer.batch_size={self.batch_size}",
            "loader.cache=disk",  # however much memory there is
            *self.overrides,
        ]

    def run(self) -> None:
        """Prepares and trains, or goes on with it, in this process."""
        tools = Tools(checkpoint_seconds=self.checkpoint_seconds)
        with composing():
            recipe = Composer.of(self.recipe()).compose()
        check(recipe)
        store = Store(self.folder / "store")
        data = store.build(Data().ingredients(recipe, {}), lambda folder: Data().make(recipe, {}, folder, tools))
        prepared, node = read(data.folder), recipe.section("model")
        model, arch = build(node["arch"], prepared.inputs, prepared.output_shape, seed=recipe.config["seed"])
        bench = StageBench(
            recipe=recipe,
            section="model",
            what="witness",
            inputs={"data": data.folder},
            folder=self.folder,
            tools=tools,
        )
        start = time.monotonic()
        fitted = bench.trained(model, distil=False)
        seconds = time.monotonic() - start
        save(self.folder, arch, fitted.model)
        outcome = {
            "seconds": {"prepared": data.seconds, "trained": seconds},
            "cache": fitted.cache,
            "accuracy": fitted.curves["train_accuracy"],
            "readings": [{**asdict(each), "hit_rate": each.hit_rate} for each in fitted.readings],
            "weights": file_digest(self.folder / "weights.safetensors"),
        }
        write_json(self.outcome, outcome)

    def command(self) -> list[str]:
        """Of a process that runs it."""
        return [
            *(sys.executable, "-P", __file__, "--train", str(self.folder), "--rows", str(self.rows)),
            *("--batch-size", str(self.batch_size), "--checkpoint-seconds", str(self.checkpoint_seconds)),
            *self.overrides,
        ]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A process that has ended.

    Attributes:
        anonymous: peak of the anonymous memory of it and its workers together, in bytes; what they share with one
            another counts for each, and pages that are mapped from files for none.
    """

    code: int
    anonymous: int
    seconds: float


def watched(command: Sequence[str], *, group: Path | None = None, die_at: int | None = None) -> Watched:
    """Runs a command to its end, looking at its memory twenty times a second.

    Args:
        group: control group that it is to be in.
        die_at: step at which the witness kills its process.
    """
    if group is not None:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    given = {} if die_at is None else {DIE_AT: str(die_at)}
    path = os.pathsep.join([str(Path(__file__).parent), import_path()])
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, env={**os.environ, **given, "PYTHONPATH": path}, start_new_session=True) as process:
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(_anonymous, _session(process.pid))))
                time.sleep(0.05)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Watched(code=process.returncode, anonymous=peak, seconds=time.monotonic() - start)


def _session(leader: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == leader:
                yield int(folder.name)


def _anonymous(pid: int) -> int:
    """In bytes, of RAM and swap, and what it shares with other processes without a file."""
    with suppress(OSError):
        lines = map(str.split, Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024 * sum(int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:", "VmSwap:"))
    return 0


class NoLimitError(HastenError):
    """There can be no control group here."""


@contextmanager
def memory_limit(limit: int) -> Iterator[Path]:
    """A control group whose processes and their page cache take at most so many bytes.

    Raises:
        NoLimitError: none can be made.
    """
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {name: path.strip("/") for _, names, path in lines for name in names.split(",")}
    if "memory" in own:
        parent, file = Path("/sys/fs/cgroup/memory") / own["memory"], "memory.limit_in_bytes"
    else:
        parent, file = Path("/sys/fs/cgroup") / own[""], "memory.max"
    group = parent / f"hasten-{os.getpid()}"
    try:
        if file == "memory.max":
            (parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        raise NoLimitError(f"no control group can be made in {parent}: {error.strerror}") from error
    try:
        (group / file).write_text(str(limit))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """The kernel takes a moment to take its last process out of it."""
    for _ in range(100):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def _peak(group: Path) -> int:
    """Of all that a control group took, the page cache included."""
    files = (group / name for name in ("memory.max_usage_in_bytes", "memory.peak"))
    return next((int(file.read_text()) for file in files if file.exists()), 0)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A training that was killed and started again, beside one that was left alone.

    Attributes:
        at: step with which it went on; not the first of an epoch.
        same_rows: every row was trained on as often, the repeated steps counted once.
        same_steps: every step had the same rows in the same order.
    """

    at: int
    repeated: int
    same_rows: bool
    same_steps: bool
    same_weights: bool


def compare(whole: Training, killed: Training, died_at: int) -> Resumed:
    one, other = Notes.of(whole.notes), Notes.of(killed.notes)
    weights = [read_json(each.outcome)["weights"] for each in (whole, killed)]
    return Resumed(
        at=died_at + 1 - len(other.repeated),
        repeated=len(other.repeated),
        same_rows=one.seen == other.seen,
        same_steps=one.rows == other.rows and not other.changed,
        same_weights=weights[0] == weights[1],
    )


def main(arguments: Sequence[str]) -> None:
    parsed = _parsed(arguments)
    if parsed.train:
        _training(parsed, parsed.rows, parsed.train).run()
        return
    with tempfile.TemporaryDirectory(prefix="hasten-", dir=parsed.folder) as scratch:
        failures = list(_drill(parsed, Path(scratch)))
    if failures:
        raise SystemExit("; ".join(failures))


def _drill(parsed: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """Prints as it goes; gives the claims that do not hold."""
    rows = scratch / "rows"
    generate(rows, int(parsed.gigabytes * 1e9 / ROW_BYTES))
    whole, killed = (_training(parsed, rows, scratch / name) for name in ("whole", "killed"))
    print("| training | ended | anonymous memory, peak MiB | with page cache, peak MiB | seconds |")
    print("|---|---|---|---|---|")
    yield from _run("undisturbed", whole, parsed)
    shutil.rmtree(whole.folder / "store")
    with ExitStack() as stack:
        group = None
        try:
            group = stack.enter_context(memory_limit(int(parsed.limit_mib * 2**20)))
            limited = f"within {parsed.limit_mib:g} MiB"
        except NoLimitError as error:
            limited = f"without a memory limit ({error})"
        die_at = int(KILLED_AT * len(Notes.of(whole.notes).rows) / EPOCHS)
        yield from _run(f"{limited}, killed at step {die_at}", killed, parsed, group, die_at)
        yield from _run(f"{limited}, started again", killed, parsed, group)
    for name, training in (("undisturbed", whole), (f"{limited}, started again", killed)):
        print(f"\n{name}:\n\n{told(read_json(training.outcome))}")
    yield from _compared(compare(whole, killed, die_at))


def _run(
    name: str, training: Training, parsed: argparse.Namespace, group: Path | None = None, die_at: int | None = None
) -> Iterator[str]:
    process = watched(training.command(), group=group, die_at=die_at)
    ended = "killed" if process.code == -signal.SIGKILL else f"code {process.code}"
    cached = f"{_peak(group) / 2**20:.0f}" if group is not None else "-"
    print(f"| {name} | {ended} | {process.anonymous / 2**20:.0f} | {cached} | {process.seconds:.0f} |", flush=True)
    if process.code != (0 if die_at is None else -signal.SIGKILL):
        raise SystemExit(f"{name}: ended with {ended}")
    if die_at is not None and die_at not in Notes.of(training.notes).rows:
        raise SystemExit(f"{name}: was killed before, most likely because memory ran out")
    if process.anonymous > parsed.anonymous_mib * 2**20:
        yield f"{name}: {process.anonymous / 2**20:.0f} MiB of anonymous memory are more than {parsed.anonymous_mib:g}"


def told(outcome: Mapping[str, Any]) -> str:
    """A table of epochs; of a training that was started again, those since then."""
    seconds, readings = outcome["seconds"], outcome["readings"]
    head = (
        f"Prepared in {seconds['prepared']:.0f} s, trained in {seconds['trained']:.0f} s. {outcome['cache']}.\n\n"
        "| epoch | accuracy | batches | MB of rows | MB read | hit rate | seconds waited |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    first = EPOCHS + 1 - len(readings)
    lines = (
        f"| {epoch} | {outcome['accuracy'][epoch - 1]:.3f} | {each['num_batches']} | {each['asked_bytes'] / 1e6:.0f} | "
        f"{_or_unknown(each['read_bytes'], 1e-6, '.0f')} | {_or_unknown(each['hit_rate'], 1, '.2f')} | "
        f"{each['waited_seconds']:.1f} |"
        for epoch, each in enumerate(readings, start=first)
    )
    return head + "\n".join(lines)


def _or_unknown(value: float | None, factor: float, form: str) -> str:
    return "unknown" if value is None else f"{value * factor:{form}}"


def _compared(resumed: Resumed) -> Iterator[str]:
    print(
        f"\nStarted again it went on with step {resumed.at}; {resumed.repeated} steps were repeated. Every row was "
        f"trained on as often as undisturbed: {_yes(resumed.same_rows)}; every step had the same rows: "
        f"{_yes(resumed.same_steps)}; the weights are the same: {_yes(resumed.same_weights)}."
    )
    if not (resumed.same_rows and resumed.same_steps and resumed.same_weights):
        yield "the killed training is not the undisturbed one"


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _training(parsed: argparse.Namespace, rows: Path, folder: Path) -> Training:
    return Training(
        rows=rows,
        folder=folder,
        batch_size=parsed.batch_size,
        checkpoint_seconds=parsed.checkpoint_seconds,
        overrides=tuple(parsed.overrides),
    )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of rows, 10^9 bytes")
    parser.add_argument("--anonymous-mib", type=float, default=1536, help="that a training may take")
    parser.add_argument("--limit-mib", type=float, default=2048, help="of the control group, page cache included")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--checkpoint-seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="for all files, for as long as it runs; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
