"""Lets one process do a piece of work under a file lock while others wait for the result.

512 processes that ask for one lock twenty times a second are ten thousand requests a second to one file server. So a
waiting process looks for the finished work before it looks at the lock, each at a moment of its own, and the less often
the longer it has waited: what it may come too late by is a fraction of what it waited for anyway.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distft.core.phase import PHASE

FIRST_S, LAST_S = 0.05, 8.0
"""Between two looks, at the beginning and after a long time."""
SHARE = 0.2
"""Share of the time waited so far."""
WORD_S = 1.0
"""Between two calls of `waiting`."""


@contextmanager
def locked_once(
    lock: Path, waiting: Callable[[], None] = lambda: None, *, done: Callable[[], bool] = lambda: False
) -> Generator[bool]:
    """Wait for the lock or until somebody else has done the work; the lock dies with its holder.

    Args:
        lock: a file of its own in a folder that exists.
        waiting: called before every look, at least once a second; it may raise.
        done: whether there is nothing left to do; asked again by whoever gets the lock.

    Yields:
        Whether it is this process's turn to work; False: done.

    Raises:
        OSError: the file cannot be made.
    """
    held, began = FileLock(lock), time.monotonic()
    while not done():
        try:
            held.acquire(blocking=False)
        except Timeout:
            waited = time.monotonic() - began
            _sleep(random.uniform(0.5, 1) * min(LAST_S, max(FIRST_S, SHARE * waited)), waiting)
            continue
        try:
            yield not done()
        finally:
            held.release()
        return
    yield False


def wait_hook() -> None:
    """Wait for another process, which is no hang, as long as nobody asks this one to stop.

    Raises:
        Preempted: somebody does.
    """
    PHASE.enter(PHASE.phase, patient=True)


def _sleep(seconds: float, waiting: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        waiting()
        time.sleep(min(left, WORD_S))
