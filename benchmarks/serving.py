"""A served model under load, and under requests that make no sense.

    python benchmarks/serving.py outputs/2026-11-29/12-00-00

It starts `mlflow models serve` on the model of a run, lets clients send rows for a while and holds every answer against
`hasten.load`; then it sends malformed requests, each of which has to be answered by 4xx with a reason; then a good one.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

JSON = {"Content-Type": "application/json"}
NUM_REQUESTS = 64
"""Different requests that the clients send in turn."""
SECONDS_TO_START = 120


def logged_model(run: Path) -> tuple[Path, Path]:
    """What a run left, as MLflow keeps it, and the deployed folder in it; both in a folder of their own."""
    from types import SimpleNamespace

    from hasten.tracking.logged_model import save

    there = SimpleNamespace(artifact_location=None, model_id=None)
    path = save(run / "model", Path(tempfile.mkdtemp(prefix="hasten-serving-"), "model"), "", there)
    return path, path / "artifacts" / "model"


@contextmanager
def served(model: Path) -> Iterator[int]:
    """`mlflow models serve` in this environment; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["models", "serve", "-m", str(model), "--env-manager", "local", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while ask(port, "GET", "/ping", b"", {})[0] != 200:
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace"))
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)


def ask(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and answer; status 0 where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def requests_of(columns: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> list[dict[str, np.ndarray]]:
    """Made-up rows, one to four in a request."""
    rng = np.random.default_rng(0)
    return [
        {
            name: rng.integers(0, 2, (number, *shape)).astype(dtypes[name])
            if np.dtype(dtypes[name]).kind == "i"
            else rng.random((number, *shape)).astype(dtypes[name])
            for name, shape in columns.items()
        }
        for number in rng.integers(1, 5, NUM_REQUESTS)
    ]


def body_of(request: dict[str, np.ndarray]) -> bytes:
    rows = {name: values.tolist() for name, values in request.items()}
    return json.dumps({"inputs": rows if len(rows) > 1 else next(iter(rows.values()))}).encode()


def load(port: int, bodies: Sequence[bytes], expected: Sequence[np.ndarray], clients: int, seconds: float) -> Any:
    """What so many clients saw: milliseconds of each request, errors, and answers that differ."""
    milliseconds: list[float] = []
    errors: list[str] = []
    differ: list[float] = []
    end = time.monotonic() + seconds

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in itertools.count(first):
            if time.monotonic() > end:
                break
            place = number % len(bodies)
            began = time.perf_counter()
            try:
                connection.request("POST", "/invocations", bodies[place], JSON)
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException) as error:
                errors.append(str(error))
                connection.close()
                continue
            milliseconds.append(1000 * (time.perf_counter() - began))
            if answer.status != 200:
                errors.append(f"{answer.status} {text[:200]!r}")
                continue
            outputs = np.array(json.loads(text)["predictions"], np.float32)
            if outputs.shape != expected[place].shape or not np.array_equal(outputs, expected[place]):
                differ.append(float(np.abs(outputs - expected[place]).max()))
        connection.close()

    threads = [threading.Thread(target=client, args=(7 * each,)) for each in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return milliseconds, errors, differ


def malformed(request: dict[str, np.ndarray], number: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """What it is, body and headers; every kind again and again, each time a little different."""
    good = json.loads(body_of(request))
    rng = np.random.default_rng(1)
    wide = rng.random((2, 3, 5, 7)).tolist()
    first = next(iter(request.values()))
    one = first.tolist() if len(request) == 1 else {name: values.tolist() for name, values in request.items()}

    def spoilt(value: Any) -> Any:
        """The first number of the first row replaced."""

        def replaced(rows: Any) -> Any:
            return [replaced(rows[0]), *rows[1:]] if isinstance(rows, list) else value

        if isinstance(one, dict):
            name = next(iter(one))
            return {**one, name: replaced(one[name])}
        return replaced(one)

    def ragged() -> Any:
        rows = [*first.tolist(), first.tolist()[0][:-1] if first.ndim > 1 else [1.0]]
        return rows if not isinstance(one, dict) else {**one, next(iter(one)): rows}

    for turn in itertools.count():
        text = json.dumps(good)
        kinds: list[tuple[str, Any, dict[str, str]]] = [
            ("an empty body", b"", JSON),
            ("broken JSON", text[: len(text) // 2 - turn].encode(), JSON),
            ("no JSON", f"hello {turn}".encode(), JSON),
            ("bytes", bytes(rng.integers(128, 256, 200 + turn, dtype=np.uint8)), JSON),
            ("no content type", text.encode(), {}),
            ("another content type", text.encode(), {"Content-Type": "image/png"}),
            ("another character set", text.encode(), {"Content-Type": "application/json; charset=latin-1"}),
            ("a list", json.dumps(one if isinstance(one, list) else [turn]).encode(), JSON),
            ("a number", str(turn).encode(), JSON),
            ("null", b"null", JSON),
            ("no inputs", json.dumps({"rows": one}).encode(), JSON),
            ("inputs twice", json.dumps({"inputs": one, "instances": one}).encode(), JSON),
            ("inputs null", b'{"inputs": null}', JSON),
            ("no rows", b'{"inputs": []}', JSON),
            ("wrong shape", json.dumps({"inputs": wide}).encode(), JSON),
            ("wrong columns", json.dumps({"inputs": {f"column{turn}": one}}).encode(), JSON),
            ("texts", json.dumps({"inputs": spoilt(f"seven{turn}")}).encode(), JSON),
            ("a null among numbers", json.dumps({"inputs": spoilt(None)}).encode(), JSON),
            ("NaN", json.dumps({"inputs": spoilt(float("nan"))}).encode(), JSON),
            ("infinity", json.dumps({"inputs": spoilt(float("-inf"))}).encode(), JSON),
            ("a number too large", json.dumps({"inputs": spoilt(10**400)}).encode(), JSON),
            ("ragged rows", json.dumps({"inputs": ragged()}).encode(), JSON),
            ("deeply nested", b'{"inputs": ' + b"[" * (5000 + turn) + b"]" * (5000 + turn) + b"}", JSON),
            ("huge", json.dumps({"inputs": [[0.5] * 300_000]}).encode(), JSON),
            ("a data frame of nothing", b'{"dataframe_split": {"columns": ["a"], "data": [[1]]}}', JSON),
            ("a broken data frame", b'{"dataframe_split": {"columns": [1, 2], "data": [[1]]}}', JSON),
            ("records of nothing", b'{"dataframe_records": [{"a": 1}, 3]}', JSON),
            ("a table", b"a,b\n1,2\n", {"Content-Type": "text/csv"}),
            ("no Parquet", b"PAR1....", {"Content-Type": "application/x-parquet"}),
        ]
        for place, (kind, body, headers) in enumerate(kinds):
            if turn * len(kinds) + place >= number:
                return
            yield kind, body, headers


def main() -> int:
    """Prints the figures; 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=200)
    given = parser.parse_args()

    import mlflow

    import hasten

    described = json.loads((given.run / "model" / "model.json").read_text())
    model = hasten.load(given.run / "model", trust=["native code"])
    dtypes = {each["name"]: each["dtype"] for each in described["signature"]["inputs"]}
    columns = {name: tuple(shape) for name, shape in described["preprocessing"]["columns"].items()}
    requests = requests_of(columns, {name: dtypes.get(name, "float32") for name in columns})
    expected = [model(**request) for request in requests]
    path, _ = logged_model(given.run)

    loaded = mlflow.pyfunc.load_model(str(path))
    given_in = [request if len(request) > 1 else next(iter(request.values())) for request in requests]
    same = all(np.array_equal(loaded.predict(rows), outputs) for rows, outputs in zip(given_in, expected, strict=True))
    print(f"mlflow.pyfunc.load_model: {'the same outputs as' if same else 'OTHER outputs than'} hasten.load")

    with served(path) as port:
        bodies = [body_of(request) for request in requests]
        milliseconds, errors, differ = load(port, bodies, expected, given.clients, given.seconds)
        p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
        print(
            f"{given.clients} clients, {given.seconds:g} s: {len(milliseconds)} requests, {len(errors)} errors, "
            f"{len(differ)} answers that differ from hasten.load\n"
            f"{len(milliseconds) / given.seconds:.0f} requests a second; p50 {p50:.1f} ms, p90 {p90:.1f} ms, "
            f"p99 {p99:.1f} ms"
        )
        for told in errors[:3]:
            print(f"  {told}")
        answers = [
            (kind, *ask(port, "POST", "/invocations", body, headers))
            for kind, body, headers in malformed(requests[0], given.malformed)
        ]
        wrong = [(kind, status, text) for kind, status, text in answers if not (400 <= status < 500 and text.strip())]
        print(f"{len(answers)} malformed requests: {len(answers) - len(wrong)} answered 4xx with a reason")
        for kind, status, text in wrong[:40]:
            print(f"  {kind}: {status} {text[:160]!r}")
        status, text = ask(port, "POST", "/invocations", bodies[0], JSON)
        alive = status == 200 and np.array_equal(np.array(json.loads(text)["predictions"], np.float32), expected[0])
        print("still alive, with the right answer" if alive else f"NOT alive: {status} {text[:200]!r}")
    return 0 if same and alive and not (errors or differ or wrong) else 1


if __name__ == "__main__":
    sys.exit(main())
