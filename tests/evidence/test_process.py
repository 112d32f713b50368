from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.core.errors import EngineError
from hasten.core.interfaces import Graph, Input, OperatorTime, Signature, Target
from hasten.evidence.process import Worker, serving_environment
from hasten.evidence.worker import read_inputs, write_inputs

Serve = Callable[..., Path]


ROWS: NDArray[np.float32] = np.arange(14, dtype=np.float32).reshape(7, 2)
SIGNATURE = Signature(
    inputs=(
        Input(name="ids", shape=(9,), dtype="int64", dynamic=(0,)),
        Input(name="mask", shape=(9,), dtype="int64", dynamic=(0,)),
        Input(name="size", shape=(2, 3)),
    ),
    output_shape=(2,),
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "rows.npz", [ROWS])


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return Graph(
        module=tmp_path / "module",
        onnx=tmp_path / "model.onnx",
        signature=SIGNATURE,
        quantized=True,
        reference=tmp_path / "reference.safetensors",
    )


def what_it_sees(folder: Path, rows: Path, cpus: Collection[int] = ()) -> dict[str, Any]:
    with Worker(threads=3, cpus=cpus) as worker:
        worker.load(folder)
        with pytest.raises(EngineError) as raised:
            worker.time(rows, settle=0, calls=1)
    seen: dict[str, Any] = ast.literal_eval(str(raised.value).removeprefix("RuntimeError: "))
    return seen


def test_predicts_all_rows_in_batches(serve: Serve, rows: Path, tmp_path: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Doubling"))
        for batch_size in (1, 3, 100):
            worker.predict(rows, tmp_path / "outputs.npy", batch_size=batch_size)
            np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), 2 * ROWS)


def test_gives_an_engine_its_inputs_in_their_order(serve: Serve, tmp_path: Path) -> None:
    ids = np.arange(14).reshape(7, 2)
    both = write_inputs(tmp_path / "both.npz", [ids, ROWS + 1])
    with Worker(threads=1) as worker:
        worker.load(serve("Subtracting"))
        worker.predict(both, tmp_path / "outputs.npy", batch_size=3)
        assert len(worker.time(both, settle=1, calls=2).seconds) == 2
        assert worker.warm_up(both, calls=1, seconds=0.0) > 0
    np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), np.full((7, 2), -1))


def test_inputs_come_back_in_their_order_with_their_types(tmp_path: Path) -> None:
    wanted = [np.arange(3), *(np.full((3, place), place, np.float32) for place in range(1, 13))]
    given = read_inputs(write_inputs(tmp_path / "many.npz", iter(wanted)))
    assert [values.dtype for values in given] == [values.dtype for values in wanted]
    for one, other in zip(given, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_times_single_calls_in_seconds(serve: Serve, rows: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Doubling", microseconds=2000))
        seconds = worker.time(rows, settle=1, calls=4).seconds
        assert worker.warm_up(rows, calls=3, seconds=0.0) >= 2e-3
    assert seconds.shape == (4,)
    assert (seconds >= 2e-3).all()


def test_knows_when_another_process_had_its_cpu(serve: Serve, rows: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass"
    with Worker(threads=1, cpus=frozenset({cpu})) as worker:
        worker.load(serve("Doubling", microseconds=2000))
        with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as competitor:
            assert competitor.stdout is not None
            competitor.stdout.readline()
            try:
                timing = worker.time(rows, settle=1, calls=100)
            finally:
                competitor.kill()
    # The scheduler halves the CPU between the two, give or take its bonus for whoever slept.
    assert timing.starved_seconds > 0.1 * timing.seconds.sum()


def test_measures_the_peak_of_its_own_memory_and_not_its_parents(serve: Serve, rows: Path) -> None:
    parents_share = np.ones(2**25)
    with Worker(threads=1) as worker:
        worker.load(serve("Doubling"))
        before = worker.memory()
        worker.load(serve("Hungry"))
        after = worker.memory()
    assert before < parents_share.nbytes
    assert after - before == pytest.approx(2**26, rel=0.1)


def test_compiles_into_a_folder_that_it_can_load(serve: Serve, graph: Graph, rows: Path, tmp_path: Path) -> None:
    node = {"_target_": "fake_engines.Doubling", "microseconds": 1.0}
    serve("Doubling")
    with Worker(threads=1) as worker:
        worker.compile(node, graph, tmp_path / "compiled")
        assert worker.integer_share(tmp_path / "compiled") == 0.25
        operators = worker.operators(tmp_path / "compiled", rows, repeats=5)
        worker.load(tmp_path / "compiled")
    assert (tmp_path / "compiled" / "compiled.txt").read_text() == "model.onnx ('ids', 'mask', 'size') True"
    assert operators == [OperatorTime(name="double", kind="elementwise", milliseconds=5.0, calls=7.0)]


def test_what_libraries_print_corrupts_nothing(serve: Serve, rows: Path, tmp_path: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Talkative"))
        worker.predict(rows, tmp_path / "outputs.npy", batch_size=2)
    np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), 2 * ROWS)


def test_an_exception_comes_back_as_one_line_and_the_worker_goes_on(serve: Serve, rows: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Raising"))
        with pytest.raises(EngineError) as raised:
            worker.time(rows, settle=0, calls=1)
        assert str(raised.value) == "ValueError: no kernel for this operator"
        worker.load(serve("Doubling"))
        assert len(worker.time(rows, settle=0, calls=2)) == 2
    assert "fake_engines.py" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"engine.json does not say which engine runs this folder"),
        ('{"_target_": "fake_engines.Missing"}', r"engine._target_=fake_engines.Missing does not import"),
        ('{"_target_": "pathlib.Path"}', r"engine._target_=pathlib.Path is not an Engine"),
        ('{"_target_": "fake_engines.Doubling", "speed": 1}', r"unexpected keyword argument 'speed'"),
    ],
)
def test_refuses_a_folder_without_a_proper_engine(serve: Serve, written: str | None, message: str) -> None:
    folder = serve("Doubling")
    (folder / "engine.json").unlink()
    if written:
        (folder / "engine.json").write_text(written)
    with Worker(threads=1) as worker, pytest.raises(EngineError, match=message):
        worker.load(folder)


def test_refuses_an_engine_that_loses_rows(serve: Serve, rows: Path, tmp_path: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Short"))
        with pytest.raises(EngineError, match="1 rows of outputs for 4 rows of inputs"):
            worker.predict(rows, tmp_path / "outputs.npy", batch_size=4)


def test_a_crash_says_which_signal_and_what_was_written_last(serve: Serve, rows: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Segfaulting"))
        with pytest.raises(EngineError, match=r"died of signal SIGSEGV during time.*about to read address 0"):
            worker.time(rows, settle=0, calls=1)
        with pytest.raises(EngineError, match="SIGSEGV"):
            worker.memory()


def test_a_compiler_that_crashes_takes_nobody_along(serve: Serve, graph: Graph, tmp_path: Path) -> None:
    serve("Segfaulting")
    with Worker(threads=1) as worker, pytest.raises(EngineError, match=r"SIGSEGV during compile of .*compiled"):
        worker.compile({"_target_": "fake_engines.Segfaulting"}, graph, tmp_path / "compiled")
    assert not (tmp_path / "compiled" / "engine.json").exists()


def test_a_library_that_exits_is_a_dead_worker(serve: Serve, rows: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Exiting"))
        with pytest.raises(EngineError, match="exit code 3"):
            worker.time(rows, settle=0, calls=1)


def test_a_worker_that_takes_too_long_is_ended(serve: Serve, rows: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Hanging"))
        worker.request_timeout = 0.2
        with pytest.raises(EngineError, match=r"time took longer than 0.2 s \(target.request_timeout_seconds\)"):
            worker.time(rows, settle=0, calls=1)
        assert not is_running(worker.pid)
        with pytest.raises(EngineError, match=r"the process died of signal SIGKILL during memory"):
            worker.memory()


def test_an_engine_that_hangs_is_found_out_by_the_first_request(serve: Serve, rows: Path, tmp_path: Path) -> None:
    with Worker(threads=1) as worker:
        worker.load(serve("Hanging"))
        worker.request_timeout = 0.2
        with pytest.raises(EngineError, match=r"request took longer than 0.2 s"):
            worker.predict(rows, tmp_path / "outputs.npy", batch_size=2)


@pytest.mark.parametrize("step", ["compile", "load", "request"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", r"^MemoryError: std::bad_alloc"),
        ("segfault", r"died of signal SIGSEGV during {step}"),
        ("killed", r"died of signal SIGKILL, most likely because memory ran out .*during {step}"),
        ("hang", r"{step}.* took longer than 0.5 s \(target.{request}timeout_seconds\)"),
        ("eat", r"{step}.* took \d+ MB of memory, target.memory_limit_mb=300 allows 300 MB"),
        ("child eats", r"{step}.* took \d+ MB of memory, target.memory_limit_mb=300 allows 300 MB"),
    ],
)
def test_whatever_an_engine_does_its_parent_gets_the_reason(
    serve: Serve, graph: Graph, rows: Path, tmp_path: Path, step: str, how: str, reason: str
) -> None:
    folder = serve("Failing", step=step, how=how)
    expected = reason.format(step=step, request="request_" if step == "request" else "")

    def use(worker: Worker) -> None:
        worker.memory()  # it has started
        worker.timeout = worker.request_timeout = 0.5 if how == "hang" else 60.0
        if step == "compile":
            worker.compile({"_target_": "fake_engines.Failing", "step": step, "how": how}, graph, folder)
        worker.load(folder)
        worker.predict(rows, tmp_path / "outputs.npy", batch_size=2)

    with Worker(threads=1, memory_limit_mb=300) as worker, pytest.raises(EngineError, match=expected):
        use(worker)


@pytest.mark.parametrize("name", ["Spawning", "Forking"])
def test_a_worker_that_dies_leaves_no_child(serve: Serve, name: str) -> None:
    folder = serve(name)
    with Worker(threads=1) as worker, pytest.raises(EngineError, match="exit code 4"):
        worker.load(folder)
    assert has_ended(int((folder / "child").read_text()))


def test_the_kernel_would_take_the_worker_and_not_its_parent() -> None:
    with Worker(threads=1) as worker:
        assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text() == "1000\n"


def test_the_limits_are_those_of_the_target() -> None:
    limits = {"memory_limit_mb": 700.0, "timeout_seconds": 5.0, "request_timeout_seconds": 2.0}
    worker = Worker.of(Target(device="cpu", threads=2, batch_size=1, engines=("eager",), **limits), {0})
    assert (worker.process.threads, worker.process.cpus) == (2, {0})
    assert (worker.process.memory_limit_mb, worker.timeout, worker.request_timeout) == tuple(limits.values())


def test_serves_without_torch_in_the_environment_and_import_path_of_its_parent(serve: Serve, rows: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    seen = what_it_sees(serve("Curious"), rows, cpus={cpu})
    assert seen["torch"] is False
    assert seen["threads"] == "3"
    assert seen["cpus"] == [cpu]
    assert seen["path"] == [os.path.abspath(entry) for entry in sys.path if os.path.exists(entry or ".")]


def test_an_interrupt_of_the_parents_group_does_not_reach_it(serve: Serve, rows: Path) -> None:
    seen = what_it_sees(serve("Curious"), rows)
    assert seen["group"] != os.getpgid(0)
    assert seen["cpus"] == sorted(os.sched_getaffinity(0))


def test_both_sides_of_a_comparison_get_the_same_allocator_and_threads() -> None:
    environment = serving_environment(2)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "2"
    assert int(environment["MALLOC_MMAP_THRESHOLD_"]) == 8589934592
    assert environment["GOMP_SPINCOUNT"] == "10000"


def test_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from hasten.evidence.process import Worker\n"
            "worker = Worker(threads=1).__enter__()\n"
            "worker.memory()\n"
            "print(worker.pid, flush=True)\n"
            "input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    assert has_ended(pid)


def has_ended(pid: int) -> bool:
    """Whether the process, which has been told to, ends."""
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        os.sched_yield()
    return not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether the process is there and more than a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
