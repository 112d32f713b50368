"""Work that is done before its result is wanted."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

T = TypeVar("T")


class _End:
    """What a thread that has no more results says last."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def ahead(results: Iterator[T], number: int) -> Generator[T, None, None]:
    """The same results, of which a thread has up to `number` ready before they are asked for.

    What the thread raises is raised where the result was asked for, with the traceback from the thread. The thread has
    ended when the generator has, also when that is closed half-way.

    Args:
        results: are made in the thread, where its iterator is also closed if it can be.
        number: at least 1.
    """
    made: SimpleQueue[T | _End] = SimpleQueue()
    room, stopped = Semaphore(number), Event()
    thread = Thread(target=_make, args=(results, made, room, stopped), name="batches ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(result := made.get(), _End):
            room.release()
            yield result
        if result.error is not None:
            raise result.error
    finally:
        stopped.set()
        room.release()  # the thread may be waiting for it
        thread.join()


def _make(results: Iterator[T], made: SimpleQueue[T | _End], room: Semaphore, stopped: Event) -> None:
    error = None
    try:
        while room.acquire() and not stopped.is_set():
            made.put(next(results))
    except StopIteration:
        pass
    except BaseException as raised:  # it is the consumer's to handle
        error = raised
    finally:
        if isinstance(results, Generator):
            results.close()
        made.put(_End(error))
