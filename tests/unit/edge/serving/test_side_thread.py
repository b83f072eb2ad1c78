"""A thread beside the others: work in its order, and gone when there is none."""

import threading
from functools import partial

from edge.serving.side_thread import SideThread
from tests.integration.harness import until


def test_side_thread_works_in_order_and_off_the_callers_thread() -> None:
    side, done, names, last = SideThread("beside"), list[int](), set[str](), threading.Event()

    def note(number: int) -> None:
        done.append(number)
        names.add(threading.current_thread().name)

    for i in range(50):
        side.put(partial(note, i))
    side.put(last.set)
    assert last.wait(20)
    assert done == list(range(50)) and names == {"beside"}


def test_side_thread_ends_when_there_is_nothing_to_do_and_begins_again() -> None:
    side = SideThread("beside, once more")
    for _ in range(2):
        done = threading.Event()
        side.put(done.set)
        assert done.wait(20)
        until(lambda: all(thread.name != "beside, once more" for thread in threading.enumerate()), "the thread's end")
