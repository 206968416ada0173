"""The next steps built by a thread while the current one trains: same items, same order, errors passed on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(items: Iterable[Item], *, ahead: int) -> Iterator[Item]:
    """Yield `items`, up to `ahead` made early by a thread, which ends when the iterator is closed or dropped.

    Raises:
        BaseException: whatever `items` raised, at the item it was raised for.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def fill() -> None:
        def put(item: Item | None, error: BaseException | None, more: bool) -> None:
            while not closed.is_set():
                with suppress(queue.Full):
                    ready.put((item, error, more), timeout=0.1)
                    return

        try:
            for item in items:
                put(item, None, True)
                if closed.is_set():
                    return
            put(None, None, False)
        except BaseException as error:  # handed to the reader, who raises it
            put(None, error, False)

    thread = threading.Thread(target=fill, name="distft-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = ready.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item  # pyright: ignore[reportReturnType]
    finally:
        closed.set()
        thread.join(timeout=5)
