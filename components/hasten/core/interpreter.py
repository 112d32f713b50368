"""What processes that hasten starts have in common: where they import from, and a channel that no library writes to."""

from __future__ import annotations

import os
import sys
import time
from threading import Thread
from typing import IO

PARENT = "HASTEN_PARENT"
"""Environment variable of a process that trains with others: the process that it ends with."""


def import_path() -> str:
    """Where this process imports from, less what is no place but the hook of an editable install."""
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path if os.path.exists(entry or os.curdir))


def private_channel() -> tuple[IO[str], IO[str]]:
    """Keeps both ends for us: what a library prints goes to standard error, what it reads is empty.

    Returns:
        What came in on standard input, and where standard output went.
    """
    sys.stdout.flush()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def leave_with_parent() -> None:
    """Has this process end when the one that `PARENT` names is gone: in peace, so that nobody starts it again."""
    Thread(target=_leave_with, args=(int(os.environ[PARENT]),), daemon=True).start()


def _leave_with(parent: int) -> None:
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(0)
        time.sleep(1)
