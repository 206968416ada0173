"""`python -m distft.demo.tour`: the main job three times on this machine, and what it taught, measured.

A tiny model learns from random weights to triage incident reports; LoRA and QLoRA then teach it a second answer
format. Every number in the closing table is counted on answers generated for held-out reports.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distft.core import supervise
from distft.core.errors import DistftError, MachineError, Preempted
from distft.demo.files import MODEL, SCHEME, locate_path
from distft.demo.incidents import Style
from distft.demo.scoring import score

HELD_OUT: dict[Style, str] = {"lines": "demo:incidents/valid", "json": "demo:incidents-json/valid"}


@dataclass(frozen=True, kw_only=True)
class DemoStage:
    """One launch of the main job."""

    recipe: str
    launch: str
    style: Style
    """The answer format it teaches."""
    min_conforms: float
    min_severity: float
    min_all_right: float


FULL = DemoStage(
    recipe="tiny-full", launch="cpu-zero3", style="lines", min_conforms=0.95, min_severity=0.85, min_all_right=0.5
)
ADAPTERS = (
    DemoStage(
        recipe="tiny-lora", launch="cpu-ddp", style="json", min_conforms=0.9, min_severity=0.8, min_all_right=0.4
    ),
    DemoStage(
        recipe="tiny-qlora", launch="cpu-ddp", style="json", min_conforms=0.9, min_severity=0.8, min_all_right=0.4
    ),
)


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """How one model answered the held-out reports of one format."""

    label: str
    style: Style
    conforms: float
    """Fraction of answers in the format."""
    severity: float
    """Fraction of answers in the format and with the right severity."""
    all_right: float
    """Fraction of answers in the format and with all four fields right: a number copied, a service found."""
    train_s: float | None
    """Wall time of the launch before it, start-up included; None when nothing was trained."""
    sample: str
    """Its answer to the first held-out report."""


class TourError(DistftError):
    """A stage that stopped, or one that ran and did not teach what it should."""


@dataclass(frozen=True, kw_only=True)
class Tour:
    """Runs stages into one fresh folder and keeps what they scored."""

    console: Console
    folder: Path
    exams: list[DemoScores] = field(default_factory=list)

    def final(self, stage: DemoStage) -> Path:
        """Return the model folder a stage leaves."""
        return self.folder / stage.recipe / "final"

    def train(self, stage: DemoStage, *settings: str) -> float:
        """Run the main job, its output passed through; returns wall seconds.

        Raises:
            TourError: the job stopped with a failure.
        """
        job = ["--config_file", f"launch/{stage.launch}.yaml", "-m", "distft.train", f"recipes/{stage.recipe}.toml"]
        job += ["--output-dir", self.folder.as_posix(), *(word for pair in settings for word in ("--set", pair))]
        self.console.print(f"\n[bold]$ accelerate launch {shlex.join(job)}[/bold]", highlight=False, soft_wrap=True)
        start = time.monotonic()
        # The module, not the script: it is this interpreter's accelerate whatever PATH says.
        command = [sys.executable, "-m", "accelerate.commands.launch", *job]
        ended = supervise.run(command, env=os.environ, launcher=True)
        if ended.signals and ended.code:
            raise Preempted(f"stopped by {signal.Signals(ended.signals[0]).name} in {stage.recipe}")
        if ended.code:
            raise TourError(f"{stage.recipe} stopped{_reason(self.folder / stage.recipe, ended.code)}")
        return time.monotonic() - start

    def examine(self, label: str, model: Path, style: Style, train_s: float | None = None) -> DemoScores:
        """Let the model answer every held-out report of a format, and mark the answers."""
        from transformers.utils import logging

        from distft.demo.generate import answers

        logging.disable_progress_bar()  # loading half a million weights needs none
        lines = Path(locate_path(HELD_OUT[style])).read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, str]] = [json.loads(line) for line in lines]
        with self.console.status(f"{label}: answering {len(rows)} held-out reports"):
            written = answers(model, [row["prompt"] for row in rows])
        marks = [score(row, text, style) for row, text in zip(rows, written, strict=True)]
        exam = DemoScores(
            label=label,
            style=style,
            conforms=sum(mark.conforms for mark in marks) / len(marks),
            severity=sum(mark.severity_match for mark in marks) / len(marks),
            all_right=sum(mark.all_right for mark in marks) / len(marks),
            train_s=train_s,
            sample=written[0],
        )
        summary = (
            f"{exam.conforms:.1%} in {style} format, {exam.severity:.1%} of severities, {exam.all_right:.1%} all right"
        )
        self.console.print(f"{label}: {summary}")
        self.exams.append(exam)
        return exam

    def learn(self, stage: DemoStage, label: str, *settings: str) -> None:
        """Train a stage and hold it to what it must reach.

        Raises:
            TourError: it failed, or it scored below its minimum.
        """
        seconds = self.train(stage, *settings)
        exam = self.examine(label, self.final(stage), stage.style, seconds)
        reached = {
            "format conformance": (exam.conforms, stage.min_conforms),
            "severity match": (exam.severity, stage.min_severity),
            "all fields right": (exam.all_right, stage.min_all_right),
        }
        if any(value < least for value, least in reached.values()):
            shortfalls = ", ".join(f"{name} {value:.3f} (at least {least})" for name, (value, least) in reached.items())
            raise TourError(f"{stage.recipe} trained but learned too little: {shortfalls}")

    def show(self) -> None:
        """Show the closing table, and one report with everyone's answer."""
        table = Table(title="200 held-out reports, greedy generation")
        table.add_column("model")
        table.add_column("asked for")
        for heading in ("format conformance", "severity match", "all right", "seconds"):
            table.add_column(heading, justify="right")
        for exam in self.exams:
            seconds = "-" if exam.train_s is None else f"{exam.train_s:.0f}"
            figures = [f"{value:.3f}" for value in (exam.conforms, exam.severity, exam.all_right)]
            table.add_row(exam.label, exam.style, *figures, seconds)
        self.console.print()
        self.console.print(table)
        for style, dataset in HELD_OUT.items():
            exams = [exam for exam in self.exams if exam.style == style]
            if exams:
                with Path(locate_path(dataset)).open(encoding="utf-8") as rows:
                    row = json.loads(next(rows))
                _quote(self.console, "report", row["prompt"].strip())
                _quote(self.console, "right answer", row["completion"])
                for exam in exams:
                    _quote(self.console, exam.label, exam.sample or "(nothing)")


def _quote(console: Console, title: str, text: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    # A model without training writes anything, control characters and rich markup included.
    console.print("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text), markup=False, highlight=False)


def _reason(run: Path, code: int) -> str:
    """Return the reason in the run's exit.json, which has the exit code that launchers flatten."""
    try:
        record = json.loads((run / "exit.json").read_text(encoding="utf-8"))
        return f" with code {record['code']}: {record['reason']}"
    except (OSError, ValueError, KeyError):
        return f" with code {code}; its own message is above"


def _fresh_folder(root: Path) -> Path:
    """Return the first `try-N` that nobody has used."""
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (root / f"try-{number}").mkdir()
            break
    return root / f"try-{number}"


def _run(console: Console, *, quick: bool) -> None:
    missing = [name for name in ("recipes/tiny-full.toml", "launch/cpu-zero3.yaml") if not Path(name).is_file()]
    if missing:
        raise MachineError(f"{', '.join(missing)} not found: run the tour from the root of a distft checkout")
    start = time.monotonic()
    tour = Tour(console=console, folder=_fresh_folder(Path("runs")))
    try:
        tour.examine("random weights", Path(locate_path(SCHEME + MODEL)), "lines")
        tour.learn(FULL, "full fine-tuning")
        if not quick:
            tour.examine("before LoRA and QLoRA", tour.final(FULL), "json")
            base = f"model.path={tour.final(FULL).as_posix()}"
            tour.learn(ADAPTERS[0], "LoRA", base)
            tour.learn(ADAPTERS[1], "QLoRA", base)
    finally:
        if tour.exams:
            tour.show()
    console.print(f"\nDone in {time.monotonic() - start:.0f} s. The models are in {tour.folder.as_posix()}/*/final.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tour; 0 when every stage reached what it must."""
    parser = argparse.ArgumentParser(prog="python -m distft.demo.tour", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="full fine-tuning only")
    quick = parser.parse_args(argv).quick
    console = Console()
    try:
        _run(console, quick=quick)
    except DistftError as error:
        console.print(f"\n{error}", style="red", markup=False, highlight=False)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
