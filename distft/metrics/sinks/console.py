"""For people: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distft.core.duration import duration


def _is_step(record: dict[str, Any]) -> bool:
    return "loss" in record


def _line(record: dict[str, Any]) -> str:
    if not _is_step(record):
        parts = [f"{name} {value:.4g}" for name, value in record.items() if "." in name]
        if "eval_loss" in record:  # there may be answers alone
            parts.insert(0, f"eval loss {record['eval_loss']:.4f} over {record['eval_tokens']:,.0f} tokens")
        return "  ".join(parts)
    mfu = "" if record["mfu"] is None else f"  mfu {100 * record['mfu']:.1f} %"
    return (
        f"loss {record['loss']:.4f}  norm {record['grad_norm']:.3g}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_s']:,.0f} tok/s{mfu}  {record['memory_gib']:.1f} GiB"
    )


class BarSink:
    """One live line that says what is happening, step, loss, tokens/s and time left; evaluations stay above it."""

    every_step = False

    def __init__(self, name: str, num_steps: int, start: int) -> None:
        columns = (
            TextColumn("[bold]{task.fields[run]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=4)
        self._task = self._progress.add_task("starting", total=num_steps, completed=start, run=name)
        self._progress.start()

    def write(self, record: dict[str, Any]) -> None:
        """Print a record; first, last and evaluation records always, others every few seconds."""
        if not _is_step(record):
            self._progress.console.print(f"step {record['step']}  {_line(record)}")
        else:
            self._progress.update(self._task, completed=record["step"], description=_line(record))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()


class LineSink:
    """A line at most every few seconds, so that logs of long runs stay readable."""

    every_step = False
    SECONDS = 5.0

    def __init__(self, name: str, num_steps: int, start: int) -> None:
        self._name, self._total, self._start = name, num_steps, start
        self._first: tuple[int, float] | None = None
        """(step, when) of the first record: evaluations and warm-up before it say nothing about the rest."""
        self._last_print_s = 0.0

    def write(self, record: dict[str, Any]) -> None:
        """First, last and evaluation records are always written."""
        step, now = record["step"], time.monotonic()
        is_step = _is_step(record)
        if is_step and self._first is None:
            self._first = (step, now)
        if is_step and step not in (self._start + 1, self._total) and now - self._last_print_s < self.SECONDS:
            return
        left = ""
        if is_step:
            self._last_print_s = now
        if is_step and self._first is not None and step > self._first[0]:
            seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
            left = f"  {duration(seconds)} left"
        print(f"{self._name} {step}/{self._total}  {_line(record)}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: nothing is buffered."""
