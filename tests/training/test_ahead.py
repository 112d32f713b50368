"""Results that are ready before they are asked for."""

import threading
import traceback

import pytest

from hasten.training.ahead import ahead


def squares(number, made=None):
    for value in range(number):
        if made is not None:
            made.append(value)
        yield value * value


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches ahead"]


@pytest.mark.parametrize("number", [1, 2, 50])
def test_gives_what_it_was_given_in_order(number):
    assert list(ahead(squares(20), number)) == list(squares(20))
    assert threads() == []


def test_is_ahead_by_as_much_as_it_may_and_no_more():
    waiting, made = threading.Event(), []

    def watched():
        for value in squares(10, made):
            if len(made) == 4:
                waiting.set()
            yield value

    results = ahead(watched(), 3)
    assert next(results) == 0
    assert waiting.wait(10)
    threads()[0].join(0.05)  # it would go on now
    assert made == [0, 1, 2, 3]
    results.close()


def test_an_error_arrives_where_the_result_was_wanted_and_tells_where_it_arose():
    def broken():
        yield 1
        raise ZeroDivisionError("of the source")

    results = ahead(broken(), 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError, match="of the source") as caught:
        next(results)
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == []


def test_whoever_stops_early_leaves_no_thread_and_no_open_source():
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(threading.current_thread().name)

    results = ahead(endless(), 2)
    next(results)
    results.close()
    assert (closed, threads()) == (["batches ahead"], [])


def test_an_interrupt_of_the_consumer_leaves_no_thread():
    results = ahead(squares(100), 2)
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert threads() == []
