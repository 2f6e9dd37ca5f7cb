"""How Python's cyclic garbage collector is set in the processes that have something to do for every token."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG_OBJECTS = 20_000


def settle() -> None:
    """Called when a process has loaded what it needs: that stays, and is not looked through again.

    A step of a thousand sequences makes some thousands of objects that live for a moment: the usual threshold of 700
    would have each step traversed several times. PERF: 6 % of a frontend's time a token.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind, with which Triton is made, tells of everything at the end
    gc.set_threshold(_YOUNG_OBJECTS)


@contextmanager
def postponed() -> Iterator[None]:
    """Within, nothing is collected: for what makes many objects that stay, such as imports.

    PERF: a tenth of the time that torch takes to import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
