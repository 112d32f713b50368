"""A run on several hosts: the process of rank 0 plans, measures and records; all others follow it.

torchrun starts the same command as many times as there are to be processes. The first is the planner: it runs the
command as it would alone. Every other is a follower: it waits at the address where the processes of a training would
meet (`MASTER_ADDR`, `MASTER_PORT`), is told which process to start for its rank, and ends with the planner. One line of
JSON is one message. Nobody waits for another for ever: whoever is silent for `SILENCE_SECONDS` is gone.

A process of a training that dies is started again by the planner, with all others. A planner, a follower or a host that
dies is torchrun's affair, whose agents start the command again; the store and its checkpoints have what was done.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from hasten.core.errors import ConfigError
from hasten.core.files import digest, read_json, write_json
from hasten.core.interpreter import PARENT, import_path
from hasten.core.sections import Distributed

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or torchrun's agent has ended."""
START_SECONDS = 300.0
"""That followers wait for the planner, and it for them, when a run begins."""
SILENCE_SECONDS = 30.0
BEAT_SECONDS = 2.0
LOOK_SECONDS = 20.0
"""In which what one host writes is to be seen by all: file systems of a network keep what they know for a while."""
_SEND_SECONDS = 10.0
_PAUSE_SECONDS = 0.2
_TAIL_BYTES = 1_000
_MODULES = "hasten.stages."
_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    "TORCHELASTIC_USE_AGENT_STORE",
)

Message = Mapping[str, Any]


class Lost(SystemExit):
    """Ends the planner so that torchrun starts the command again: no trial failed, and none is to be judged."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process' place among those that torchrun started.

    Attributes:
        rank: number of this process; 0 plans.
        world: number of processes.
        local_world: of them on one host.
        variables: what torchrun said, by the names of the environment's variables.
    """

    rank: int
    world: int
    local_world: int
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        return self.variables["MASTER_ADDR"], int(self.variables["MASTER_PORT"])

    def environment(self, *, port: int, threads: int, more: Mapping[str, str]) -> dict[str, str]:
        """Of a process that trains at this place, and ends with this one."""
        return {
            **os.environ,
            **self.variables,
            **more,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": import_path(),
            PARENT: str(os.getpid()),
        }


def place() -> Place | None:
    """Where torchrun has put this process; None where it did not start it.

    Raises:
        ConfigError: torchrun's agent keeps the address for itself where the processes are to meet.
    """
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} <= found.keys():
        return None
    if found.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "torchrun shares its store with the processes it starts, and after a failure they would wait for dead ones "
            "(pytorch#135712): set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d; hasten launch prints "
            "the whole command"
        )
    return Place(
        rank=int(found["RANK"]),
        world=int(found["WORLD_SIZE"]),
        local_world=int(found.get("LOCAL_WORLD_SIZE", 1)),
        variables=found,
    )


class Line:
    """A connection that carries one message a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._rest = connection, b""
        self._sending = threading.Lock()
        self.heard = time.monotonic()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Raises OSError where nobody is there any more."""
        with self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def received(self) -> list[Message]:
        """What has come; to be asked for when there is something.

        Raises:
            OSError: nobody is there any more, or somebody who speaks otherwise.
        """
        chunk = self._connection.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError("the other side has left")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self.heard = time.monotonic()
        try:
            return [dict(json.loads(line)) for line in lines]
        except ValueError as error:
            raise ConnectionError("the other side is none of ours") from error

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self.heard > SILENCE_SECONDS

    def close(self) -> None:
        self._connection.close()


class Ended(NamedTuple):
    """A follower's process of a job that is over: exit code, and the last that it said."""

    code: int
    told: str


class Planner:
    """Rank 0, for the length of a `with` block: it knows its followers and tells them what to start."""

    def __init__(self, own: Place) -> None:
        self.place = own
        self._changed = threading.Condition()
        self._lines: dict[int, Line] = {}
        self._lost = ""
        self._seen: dict[int, bool] = {}
        self._ended: dict[int, dict[int, Ended]] = {}
        self._jobs = itertools.count(1)
        self._over = False
        self._checked: set[Path] = set()

    def __enter__(self) -> Planner:
        try:
            # Of all of this host's addresses: what MASTER_ADDR says may be another to this host than to the others.
            self._server = socket.create_server(("", self.place.address[1]))
        except OSError as error:
            raise Lost(f"hasten: can't wait for followers at port {self.place.address[1]}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._over = True
        self._thread.join()
        self._server.close()
        for line in self._lines.values():
            line.close()

    @property
    def followers(self) -> int:
        """How many there are to be."""
        return self.place.world - 1

    def dismiss(self, code: int, *, patience: float = LOOK_SECONDS) -> None:
        """Has all followers end with this exit code, those too that come within so many seconds."""
        with self._changed:
            self._changed.wait_for(self._is_complete, patience)
            self._tell(do="end", code=code)
            # They close the line: were it closed here, what was just said could be lost with it.
            self._changed.wait_for(lambda: not self._lines, _SEND_SECONDS)

    def meet(self, spread: Distributed, folder: Path, *, min_nodes: int | None) -> None:
        """Waits for all followers, and looks whether they are as many as asked for and see the same store.

        Args:
            folder: of the store.
            min_nodes: hosts with which the run may go on; None for all.

        Raises:
            ConfigError: they are too few or too many, or don't see it.
        """
        self._check_number(spread, min_nodes)
        if folder in self._checked:
            return
        self._leave_if_ended(folder)
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / f".seen-{uuid.uuid4().hex}"
        token.touch()
        try:
            with self._changed:
                if not self._changed.wait_for(self._is_complete, START_SECONDS):
                    raise Lost(f"hasten: {self._told_of_absent()} within {START_SECONDS:g} s")
                self._raise_if_lost()
                self._seen.clear()
                self._tell(do="look", file=str(token))
                answered = self._changed.wait_for(self._have_looked, 2 * LOOK_SECONDS)
                self._raise_if_lost()
                blind = sorted(rank for rank, seen in self._seen.items() if not seen)
        finally:
            token.unlink()
        if blind or not answered:
            who = f"the process of rank {blind[0]} does" if blind else "its followers do"
            raise ConfigError(
                f"store.folder={folder} is not shared: {who} not see what is written there; give a folder that all "
                "hosts have at the same place"
            )
        self._checked.add(folder)

    def _check_number(self, spread: Distributed, min_nodes: int | None) -> None:
        there, wanted = self.place.world, spread.devices
        if there == wanted:
            return
        told = f"torchrun started {there} process{'es' if there > 1 else ''}, and distributed.devices={wanted}"
        if there > wanted:
            raise ConfigError(f"{told}: --nnodes times --nproc-per-node must be distributed.devices")
        if min_nodes is None or there < min_nodes * self.place.local_world:
            raise ConfigError(
                f"{told}: --nnodes times --nproc-per-node must be distributed.devices, or at least launch.min_nodes "
                "times --nproc-per-node where a run may go on with fewer hosts"
            )
        spread.mesh(there)
        log.warning("%s: going on with fewer", told)

    def ended(self, code: int) -> None:
        """Notes that this run has ended by itself: torchrun starts whatever fails again, and it would fail again."""
        for folder in self._checked:
            write_json(self._end_of(folder), {"code": code})

    def _leave_if_ended(self, folder: Path) -> None:
        end = self._end_of(folder)
        if int(self.place.variables.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            end.unlink(missing_ok=True)
        elif end.exists():
            raise SystemExit(int(read_json(end)["code"]))

    def _end_of(self, folder: Path) -> Path:
        return folder / ".locks" / f"ended-{digest(self.place.variables['TORCHELASTIC_RUN_ID'])[:16]}.json"

    def _is_complete(self) -> bool:
        return bool(self._lost) or len(self._lines) == self.followers

    def _have_looked(self) -> bool:
        return bool(self._lost) or len(self._seen) == self.followers

    def _told_of_absent(self) -> str:
        absent = [str(rank) for rank in range(1, self.place.world) if rank not in self._lines]
        return f"no process of rank {', '.join(absent)} came"

    def _raise_if_lost(self) -> None:
        if self._lost:
            raise Lost(f"hasten: {self._lost}; torchrun starts the run again where it has restarts left")

    @contextmanager
    def job(
        self, module: str, arguments: Sequence[str], *, threads: int, environment: Mapping[str, str] | None = None
    ) -> Iterator[Job]:
        """Has every follower run `python -m module arguments` for the length of the block, beside other jobs.

        Args:
            module: below `hasten.stages`; it joins a group, and calls `core.interpreter.leave_with_parent`.
            threads: of each process.
            environment: variables for them besides torchrun's.

        Returns:
            What this process needs for its own process of rank 0.

        Raises:
            Lost: a follower is gone; by `Job.died` and `Job.finished` too.
        """
        more, port = dict(environment or {}), _free_port()
        with self._changed:
            complete = self._changed.wait_for(self._is_complete, START_SECONDS)
            self._raise_if_lost()
            if not complete:
                raise Lost(f"hasten: {self._told_of_absent()} within {START_SECONDS:g} s")
            number = next(self._jobs)
            self._ended[number] = {}
            told = {"job": number, "module": module, "arguments": list(arguments), "folder": os.getcwd()}
            self._tell(do="start", **told, port=port, threads=threads, environment=more)
        try:
            environment_of_first = self.place.environment(port=port, threads=threads, more=more)
            yield Job(planner=self, number=number, environment=environment_of_first)
        finally:
            with self._changed:
                del self._ended[number]
                self._tell(do="stop", job=number)

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            with suppress(OSError):  # whoever is gone is found out when nothing comes from there
                line.send(**message)

    def _ends(self, job: int) -> dict[int, Ended]:
        with self._changed:
            self._raise_if_lost()
            return dict(self._ended.get(job, {}))

    def _serve(self) -> None:
        """Listens to followers, and lets them know that this process is there."""
        agent = os.getppid()
        beat = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while not self._over:
                for key, _ in selector.select(_PAUSE_SECONDS):
                    if key.fileobj is self._server:
                        with suppress(OSError):  # whoever called has hung up already
                            connection, _ = self._server.accept()
                            selector.register(Line(connection), selectors.EVENT_READ)
                        continue
                    line = key.fileobj
                    assert isinstance(line, Line)
                    try:
                        messages = line.received()
                    except OSError as error:
                        selector.unregister(line)
                        self._leave(line, str(error))
                        line.close()
                        continue
                    for message in messages:
                        self._hear(line, message)
                if time.monotonic() - beat < BEAT_SECONDS:
                    continue
                beat = time.monotonic()
                for line in list(self._lines.values()):
                    with suppress(OSError):
                        line.send(do="beat")
                    if line.is_silent:
                        selector.unregister(line)
                        self._leave(line, f"nothing was heard from it for {SILENCE_SECONDS:g} s")
                if os.getppid() != agent:  # what would start this process again is gone
                    agent = os.getppid()
                    os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, line: Line, message: Message) -> None:
        with self._changed:
            match message:
                case {"rank": int(rank)}:
                    self._lines[rank] = line
                case {"seen": bool(seen), "from": int(rank)}:
                    self._seen[rank] = seen
                case {"ended": int(job), "from": int(rank), "code": int(code), "told": str(told)} if job in self._ended:
                    self._ended[job][rank] = Ended(code, told)
            self._changed.notify_all()

    def _leave(self, line: Line, why: str) -> None:
        with self._changed:
            for rank in [rank for rank, other in self._lines.items() if other is line]:
                self._lines.pop(rank).close()
                self._lost = self._lost or f"the process of rank {rank} is lost ({why})"
            self._changed.notify_all()


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes of one training.

    Attributes:
        number: by which planner and followers speak of it.
        environment: of the process of rank 0, which whoever began the job starts itself.
    """

    planner: Planner
    number: int
    environment: Mapping[str, str]

    def died(self) -> tuple[int, Ended] | None:
        """Rank and end of a follower's process that ended otherwise than with exit code 0."""
        ends = self.planner._ends(self.number)
        return next(((rank, end) for rank, end in sorted(ends.items()) if end.code != 0), None)

    def finished(self) -> bool:
        """Whether all followers' processes have ended with exit code 0."""
        ends = self.planner._ends(self.number)
        return len(ends) == self.planner.followers and self.died() is None


_planners: list[Planner] = []


def planner() -> Planner | None:
    """That of this process; None where torchrun did not start it."""
    return _planners[-1] if _planners else None


def planned(own: Place | None, command: Callable[[], int]) -> int:
    """Runs a command as the planner, or as ever where torchrun did not start this process; gives its exit code.

    The variables that torchrun set are taken out of the environment: nothing that this process starts or loads is to
    take itself for one of a group.
    """
    if own is None:
        return command()
    for name in _VARIABLES:
        os.environ.pop(name, None)
    with _interrupted_by(signal.SIGTERM), Planner(own) as it:
        _planners.append(it)
        code = 1
        try:
            code = command()
            if code not in (0, INTERRUPTED):
                it.ended(code)
            return code
        finally:
            _planners.remove(it)
            it.dismiss(code, patience=0.0 if code == INTERRUPTED else LOOK_SECONDS)


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """A signal ends the block as Ctrl-C would, so that it closes what it has opened."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def follow(own: Place) -> int:
    """Starts what the planner says until it says that all is over; gives the exit code that it wants.

    Whatever keeps this process from that ends it with 1, so that torchrun starts the run again.
    """
    with _interrupted_by(signal.SIGTERM):
        try:
            with closing(_reached(own)) as line, closing(_Follower(own, line)) as follower:
                return follower.followed()
        except KeyboardInterrupt:
            return INTERRUPTED
        except OSError as error:
            print(f"hasten: rank {own.rank}: the process that plans is lost ({error})", file=sys.stderr)
            return 1


def _reached(own: Place) -> Line:
    """A connection to the planner, who may still have to start."""
    agent, deadline = os.getppid(), time.monotonic() + START_SECONDS
    while True:
        try:
            line = Line(socket.create_connection(own.address, timeout=_SEND_SECONDS))
            line.send(rank=own.rank)
            return line
        except OSError:
            if time.monotonic() > deadline or os.getppid() != agent:
                raise
        time.sleep(_PAUSE_SECONDS)


class _Follower:
    """A process of a rank other than 0, and what it has started."""

    def __init__(self, own: Place, line: Line) -> None:
        self._place, self._line = own, line
        self._agent = os.getppid()
        self._children: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}

    def followed(self) -> int:
        beat = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            while True:
                if selector.select(_PAUSE_SECONDS):
                    for message in self._line.received():
                        if message["do"] == "end":
                            return int(message["code"])
                        self._obey(message)
                self._tell_ends()
                if time.monotonic() - beat > BEAT_SECONDS:
                    beat = time.monotonic()
                    self._line.send(beat=True)
                if self._line.is_silent:
                    raise TimeoutError(f"nothing was heard from it for {SILENCE_SECONDS:g} s")
                if os.getppid() != self._agent:
                    raise ProcessLookupError("and torchrun's agent is gone")

    def _obey(self, message: Message) -> None:
        match message["do"]:
            case "look":
                self._line.send(seen=_seen(Path(message["file"])), **{"from": self._place.rank})
            case "start":
                self._start(message)
            case "stop":
                self._stop(message["job"])

    def _start(self, told: Message) -> None:
        if not str(told["module"]).startswith(_MODULES):
            raise ConnectionError(f"told to run {told['module']}")
        log = tempfile.TemporaryFile()  # noqa: SIM115
        settings = {"port": told["port"], "threads": told["threads"], "more": told["environment"]}
        folder = told["folder"] if Path(told["folder"]).is_dir() else None
        child = started(told["module"], told["arguments"], self._place.environment(**settings), log, folder)
        self._children[told["job"]] = child, log

    def _tell_ends(self) -> None:
        for job, (child, log) in list(self._children.items()):
            if (code := child.poll()) is None:
                continue
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            self._stop(job)
            self._line.send(ended=job, code=code, told=lines[-1] if lines else "", **{"from": self._place.rank})

    def _stop(self, job: int) -> None:
        if job in self._children:
            child, log = self._children.pop(job)
            ended(child)
            log.close()

    def close(self) -> None:
        for job in list(self._children):
            self._stop(job)


def started(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], output: Any, folder: str | None = None
) -> subprocess.Popen[bytes]:
    """A process of a training, a session of its own: Ctrl-C reaches only who started it, who then ends it."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started; nothing in it is worth an orderly end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _seen(file: Path) -> bool:
    deadline = time.monotonic() + LOOK_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def _free_port() -> int:
    """Of this host, where the processes of a training are to meet; one that is taken meanwhile costs a restart."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port
