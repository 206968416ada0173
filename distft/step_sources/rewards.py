"""Judges answers in a process of its own: one that hangs, dies or eats memory ends the process and not the run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distft.core.errors import DataError, Problem, RecipeError
from distft.recipe import listed_params
from distft.recipe.rollout import RolloutTable
from distft.scores import SCORES, Answer

START_S = 120.0
"""For a worker to import what its scores need."""
LOAD_S = 1800.0
"""For it to load what they judge with: a reward model's weights from a slow disk."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One term of the reward."""

    name: str
    """`field_match`, or with its figure where a score is used twice."""
    weight: float
    figure: str
    settings: dict[str, Any]
    """The score's name and settings."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What an answer was worth."""

    parts: tuple[float, ...] = ()
    """Values of the rewards, unweighted, in their order; empty when it could not be judged."""
    why: str = ""
    """Why it could not."""


def rewards_of(table: RolloutTable) -> tuple[Reward, ...]:
    """Return the rewards of a recipe; their settings have been checked."""
    rewards: list[Reward] = []
    for raw in table.rewards:
        settings = {key: value for key, value in raw.items() if key not in ("weight", "figure")}
        spec = SCORES[raw["name"]]
        params = listed_params(settings, spec.params)
        figure = raw.get("figure") or spec.figures(params)[0].name
        name = raw["name"] if all(reward.name != raw["name"] for reward in rewards) else f"{raw['name']}_{figure}"
        rewards.append(Reward(name=name, weight=raw.get("weight", 1.0), figure=figure, settings=settings))
    return tuple(rewards)


class RewardProcess:
    """A worker that judges answers one at a time, started again after each that it did not survive."""

    def __init__(self, rewards: Sequence[Reward], *, timeout_s: float, memory_gib: float) -> None:
        self._rewards, self._timeout_s = rewards, timeout_s
        self._memory = int(memory_gib * 2**30)
        self._process: subprocess.Popen[bytes] | None = None
        self._results = -1
        self._unread = b""

    def judge(
        self, answers: Sequence[Answer], *, most_unscored: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> list[Judged] | None:
        """Return what each answer is worth, in order; None when `stop` says so meanwhile.

        When more than `most_unscored` have no reward, the rest is not judged: the list ends there.

        Raises:
            RecipeError, DataError: the worker cannot be started with these rewards.
        """
        judged: list[Judged] = []
        unscored = 0
        for answer in answers:
            if stop():
                return None
            judged.append(self._judge(answer))
            unscored += bool(judged[-1].why)
            if most_unscored is not None and unscored > most_unscored:
                break
        return judged

    def _judge(self, answer: Answer) -> Judged:
        if self._process is None:
            self._start()
        said = self._ask(json.dumps(vars(answer)), self._timeout_s)
        if isinstance(said, str):
            self.close()
            return Judged(why=said)
        return Judged(parts=tuple(said.get("values", ())), why=said.get("why", ""))

    def _start(self) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "distft.step_sources.reward_worker", str(writing), str(self._memory)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(writing,), start_new_session=True, env=environment
        )
        os.close(writing)
        self._results, self._unread = reading, b""
        said = self._ask(json.dumps([(reward.settings, reward.figure) for reward in self._rewards]), START_S)
        if not isinstance(said, str) and "failed" not in said:
            said = self._read(LOAD_S)
        if isinstance(said, str):
            self.close()
            raise DataError(f"[[rollout.rewards]]: the process that judges answers did not start: {said}")
        if "failed" in said:
            self.close()
            raise RecipeError("[[rollout.rewards]]", [Problem(message=said["failed"])])

    def _ask(self, line: str, limit_s: float) -> dict[str, Any] | str:
        """Return what the worker says to this line, or why it says nothing."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._end()
        return self._read(limit_s)

    def _read(self, limit_s: float) -> dict[str, Any] | str:
        """Return the worker's next line, or why there is none."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._results], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return f"took longer than {limit_s:g} s"
            part = os.read(self._results, 1 << 16)
            if not part:
                return self._end()
            self._unread += part
        first, _, self._unread = self._unread.partition(b"\n")
        return json.loads(first)

    def _end(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"ended its process by {signal.Signals(-code).name}"
        return f"ended its process with code {code}"

    def close(self) -> None:
        """Kill the worker and whatever it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        os.close(self._results)
        self._process = None
