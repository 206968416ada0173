"""A run while it goes on: curves, figures and answers, from the files of its folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.files import read_json_lines
from distft.report.curves import live_curves
from distft.report.html import Html
from distft.run_record import RunRecord, number, read_run
from distft.service.job_folder import JobFolder

SHOWN = 4
"""Answers."""


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """Something that the model wrote while it was trained."""

    prompt: str
    answer: str
    where: str
    """Which state of the model wrote it, and for what."""


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """What a page shows of a run."""

    curves: Html | None
    loss: float | None
    held_out_loss: float | None
    tokens_per_s: float | None
    memory_gib: float | None
    on_gpu: bool
    training_s: float
    restarts: int
    answers: tuple[SampleAnswer, ...]


def live_run(folder: JobFolder) -> LiveRun | None:
    """Return what there is to see of a job's run; None before it has begun."""
    if not (folder.run / "metrics.jsonl").exists():
        return None
    run = read_run(folder.run)
    return LiveRun(
        curves=live_curves(run), loss=number(run.last.get("loss")), held_out_loss=run.held_out_losses[1],
        tokens_per_s=run.tokens_per_s, memory_gib=run.peak_gib, on_gpu=run.on_gpu, training_s=run.training_s,
        restarts=max(0, len(run.spans) - 1), answers=tuple(_answers(run)),
    )  # fmt: skip


def _answers(run: RunRecord) -> Iterator[SampleAnswer]:
    """Yield the newest answers: of evaluation sets, or those that the model was rewarded for."""
    newest = max((run.folder / "rollouts").glob("step-*.jsonl"), default=None)
    if newest is not None:
        yield from _shown(newest, f"step {int(newest.stem.removeprefix('step-'))}, reward ")
        return
    for result in run.results[:1]:
        for label in dict.fromkeys((result.label if result.tuned else "before", "before")):
            yield from _shown(run.folder / "eval" / label / f"{result.name}.jsonl", f"{result.name}, {label}")


def _shown(path: Path, where: str) -> Iterator[SampleAnswer]:
    lines: list[dict[str, Any]] = list(read_json_lines(path))
    for line in lines[:SHOWN]:
        reward = number(line.get("reward"))
        end = f"{reward:.3g}" if reward is not None else "" if not where.endswith("reward ") else "none"
        yield SampleAnswer(
            prompt=str(line.get("prompt", "")), answer=str(line.get("answer", "")), where=f"{where}{end}"
        )
