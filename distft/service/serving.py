"""The server's side of answers: one process that holds the models, started when it is first asked."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distft.service.errors import ApiError

_LOG = logging.getLogger("distft.service")


class AnswerService:
    """Passes requests to the process and its events back; a process that has died is started again for the next one."""

    def __init__(self, workdir: Path, *, most_waiting: int) -> None:
        self._workdir, self._most = workdir, most_waiting
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._waiting: dict[int, tuple[subprocess.Popen[str], queue.Queue[dict[str, Any]]]] = {}
        self._numbers = itertools.count(1)

    def answer(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of one request, `piece`, `end` and `done`; closing the iterator gives it up.

        Raises:
            ApiError: it is refused, too many wait, or the process died.
        """
        number, events = next(self._numbers), queue.Queue[dict[str, Any]]()
        with self._lock:
            if len(self._waiting) >= self._most:
                raise ApiError(429, "Too many requests wait for an answer; try again.", code="rate_limit_exceeded")
            child = self._running()
            self._waiting[number] = child, events
            self._send(child, {**request, "id": number})
        finished = False
        try:
            while not finished:
                event = events.get()
                finished = event["event"] in ("done", "refused", "failed")
                if event["event"] == "refused":
                    status = 503 if event["code"] == "model_unavailable" else 400
                    raise ApiError(status, event["message"], code=event["code"], param=event.get("param"))
                if event["event"] == "failed":
                    raise ApiError(500, "The model could not answer.", code="answer_failed")
                yield event
        finally:
            with self._lock:
                self._waiting.pop(number, None)
                if not finished and child.poll() is None:
                    with contextlib.suppress(ApiError):  # it has died: nobody to tell
                        self._send(child, {"give_up": number})

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._child.wait()

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "distft.service.answering", str(self._workdir)]
            self._workdir.mkdir(parents=True, exist_ok=True)
            with (self._workdir / "log.txt").open("ab") as log:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                    bufsize=1,
                )  # fmt: skip
            threading.Thread(target=self._listen, args=(self._child,), daemon=True, name="answers").start()
        return self._child

    def _send(self, child: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(message) + "\n")
            child.stdin.flush()
        except (BrokenPipeError, OSError):
            self._waiting.pop(message.get("id", 0), None)
            raise ApiError(503, "The process that answers has ended; try again.", code="model_unavailable") from None

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            with self._lock:
                _, events = self._waiting.get(event["id"], (None, None))
            if events is not None:
                events.put(event)
        code = child.wait()
        _LOG.warning("the process that answers has ended", extra={"code": code})
        with self._lock:
            if self._child is child:
                self._child = None
            for asked, events in self._waiting.values():
                if asked is child:  # those of its successor go on
                    events.put({"event": "refused", "message": "The process that answers has ended; try again.",
                                "code": "model_unavailable"})  # fmt: skip
