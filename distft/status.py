"""`distft status RUN_OR_FOLDER`: where runs are, from the files in their folders alone, so from any login node.

Nothing is locked, written or imported that is heavy: safe to ask as often as one likes, while a run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.checkpoint.lock import LOCK, STALE_S
from distft.cluster.starts import Starts
from distft.core.command_line import CommandParser, add_json
from distft.core.duration import duration
from distft.core.errors import DONE, PREEMPTED_AND_SAVED
from distft.core.files import read_json_lines, read_json_object

RECENT = 20
"""Steps that the time left is estimated from."""
TAIL_BYTES = 1 << 16
"""Bytes read of metrics.jsonl: the end of a long run's file is enough."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run."""

    run: str
    folder: str
    state: str
    """complete | running | queued | stopped | failed | lost | new."""
    why: str
    """The reason for any state that is not a good one, in the run's own words."""
    step: int | None
    num_steps: int | None
    loss: float | str | None
    tokens_per_s: float | None
    left_s: float | None
    checkpoint: int
    """Step of the newest committed one; 0: none."""
    job: str | None
    nodes: list[str]
    restarts: list[str]
    """Why each earlier start ended: of the last job, or of the run where no batch job started it."""
    startup_s: float | None
    """Seconds from the last start of rank 0's process to the end of its first step."""
    pace: str
    """What the last look at the ranks found: who is slowest, or what is wrong."""


def read_status(folder: Path, *, now: float | None = None) -> Status:
    """Return what the files of a run folder say; `now` is the wall clock's time, for tests."""
    starts = Starts(folder)
    history = starts.records()
    manifest, ended = read_json_object(folder / "manifest.json"), read_json_object(folder / "exit.json")
    steps = [record for record in read_json_lines(folder / "metrics.jsonl", last_bytes=TAIL_BYTES) if "loss" in record]
    last = steps[-1] if steps else {}
    num_steps = manifest.get("num_steps")
    state, why = _state(folder, ended, history, time.time() if now is None else now)
    begun = [record for record in history if "began" in record]
    events = read_json_lines(folder / "events.jsonl", last_bytes=TAIL_BYTES)
    return Status(
        run=folder.name,
        folder=str(folder),
        state=state,
        why=why,
        step=last.get("step"),
        num_steps=num_steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        left_s=_left(steps, num_steps) if state == "running" else None,
        checkpoint=starts.checkpoint(),
        job=begun[-1].get("job") if begun else manifest.get("slurm_job"),
        nodes=begun[-1].get("nodes", []) if begun else [host for host in [manifest.get("host")] if host],
        restarts=_restarts(history) if begun else _starts_over(events),
        startup_s=next((event.get("total_s") for event in reversed(events) if event.get("event") == "startup"), None),
        pace=_pace(events),
    )


def _state(folder: Path, ended: dict[str, Any], history: list[dict[str, Any]], now: float) -> tuple[str, str]:
    beat = _age(folder / LOCK, now)
    if beat is not None and beat < STALE_S:
        return "running", ""
    code = ended.get("code")
    last = history[-1] if history else {}
    if code == DONE:
        return "complete", ""
    if code == PREEMPTED_AND_SAVED:
        waits = last.get("then") == "requeue"
        return ("queued" if waits else "stopped"), str(ended.get("reason", ""))
    if code is not None:
        return "failed", str(ended.get("reason", ""))
    if beat is not None:
        return "lost", f"no sign of life for {duration(beat)}; the same command continues it"
    if "ended" in last:
        return "failed", str(last.get("reason", ""))
    return ("running", "") if "began" in last else ("new", "")


def _restarts(history: list[dict[str, Any]]) -> list[str]:
    """Return one reason for each restart of the last job."""
    jobs = [record.get("job") for record in history]
    ours = [record for record in history if record.get("job") == jobs[-1]]
    reasons = []
    for index, record in enumerate(ours):
        if "began" in record and any("began" in later for later in ours[index + 1 :]):
            following = ours[index + 1]
            reasons.append(following.get("reason", "") if "ended" in following else "node lost, or killed")
    return reasons


def _starts_over(events: list[dict[str, Any]]) -> list[str]:
    """Return the same from the run's own events, for starts by hand: why each followed one ended."""
    reasons: list[str] = []
    why: str | None = None
    for event in events:
        if event.get("event") == "started":
            reasons += [] if why is None else [why]
            why = "killed, or its machine was lost"
        elif event.get("event") == "ended":
            why = str(event.get("reason", ""))
    return reasons


def _pace(events: list[dict[str, Any]]) -> str:
    """Return the last start's slowest rank, or its straggler."""
    pace = ""
    for event in events:
        if event.get("event") == "started":
            pace = ""
        elif event.get("event") in ("straggler", "slower"):  # noted after the pace of the same step
            pace = f"step {event.get('step')}: {event['event']}: {event.get('what')}"
        elif event.get("event") == "pace":
            pace = (
                f"step {event.get('step')}: slowest is rank {event.get('rank')} ({event.get('host')}), "
                f"{event.get('percent')} % behind the median for {event.get('what')}"
            )
    return pace


def _left(steps: list[dict[str, Any]], num_steps: int | None) -> float | None:
    took = [record["step_s"] for record in steps[-RECENT:] if isinstance(record.get("step_s"), int | float)]
    if not took or num_steps is None:
        return None
    return sum(took) / len(took) * max(0, num_steps - steps[-1]["step"])


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def runs_in(path: Path) -> list[Path]:
    """Return the run folder itself, or those in a folder of runs."""
    if _is_run(path):
        return [path]
    return sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child)) if path.is_dir() else []


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("manifest.json", "exit.json", "starts.jsonl", LOCK))


def lines(status: Status) -> Iterator[str]:
    """Yield lines for people: one line, and one for each thing worth knowing."""
    of = f"/{status.num_steps}" if status.num_steps is not None else ""
    parts = [f"{status.run}: {status.state}", f"step {status.step or 0}{of}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}" if isinstance(status.loss, float) else f"loss {status.loss}")
    if status.state == "running" and status.tokens_per_s is not None:
        parts.append(f"{status.tokens_per_s:,.0f} tok/s")
    if status.left_s is not None:
        parts.append(f"{duration(status.left_s)} left")
    parts.append(f"checkpoint {status.checkpoint}" if status.checkpoint else "no checkpoint")
    if status.job is not None:
        parts.append(f"job {status.job}" + (f" on {' '.join(status.nodes)}" if status.nodes else ""))
    yield "  ".join(parts)
    if status.why:
        yield f"  {status.why.splitlines()[0]}"
    if status.state == "running" and status.startup_s is not None:
        yield f"  first step {duration(status.startup_s)} after the process's start"
    if status.state == "running" and status.pace:
        yield f"  {status.pace}"
    for number, reason in enumerate(status.restarts, start=1):
        yield f"  restart {number}: {reason.splitlines()[0] if reason else 'no reason was left'}"


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(prog="distft status", description="Where runs are, from their folders alone.")
    made.add_argument("path", metavar="RUN_OR_FOLDER", type=Path, help="a run folder, or a folder of run folders")
    add_json(made)
    made.add_argument("--watch", type=float, metavar="SECONDS", help="again and again, until interrupted")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    while True:
        folders = runs_in(options.path)
        if not folders:
            print(f"{options.path}: no run folder, and none in it", file=sys.stderr)
            return 8
        statuses = [read_status(folder) for folder in folders]
        if options.json:
            print(json.dumps({"runs": [asdict(status) for status in statuses]}), flush=True)
        else:
            print("\n".join(line for status in statuses for line in lines(status)), flush=True)
        if options.watch is None:
            return DONE
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:
            return DONE


if __name__ == "__main__":
    sys.exit(main())
