"""What becomes of a batch job whose run has ended: the one place that decides about starting again.

Exit codes of launchers do not tell: torchrun turns every code into 1, srun reports the largest of all tasks. The run's
own word in exit.json does, if this very start wrote it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.errors import DONE, PREEMPTED_AND_SAVED
from distft.core.files import parse_json_object

CRASHED = 1


class Phase(enum.Enum):
    """What the scheduler is doing with the job."""

    RUNNING = "running"
    TIME_LIMIT = "ended at its time limit"
    ENDING = "being ended by Slurm"
    """Cancelled by a person, preempted, or a node failed. Slurm itself puts it back in the queue where that is due."""


class Then(enum.Enum):
    """What the job does next."""

    REQUEUE = "requeue"
    END = "end"


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """What is known when the run's processes have ended."""

    status: int
    """Exit status of the launcher."""
    record: dict[str, Any] | None
    """exit.json, if this start wrote one."""
    stop_requested: bool
    """Whether a request to stop was passed on to the processes."""
    stop_file: bool
    """Whether a person's STOP file lies in the run folder."""
    phase: Phase
    stalled: int
    """Starts in a row, this one included, that began at the newest checkpoint there is now."""
    chain: bool = False
    """Another job is waiting to go on, and this queue does not requeue."""
    max_stalled: int
    """Restarts without progress that are allowed."""


@dataclass(frozen=True, kw_only=True)
class RestartDecision:
    """The decision, and why, for the job's output."""

    then: Then
    code: int
    """The run's."""
    reason: str
    """The reason of the run's end, in its own words."""
    exit_code: int
    """The job's."""
    why: str
    """The reason of the decision."""


def judge(ended: JobEnd) -> RestartDecision:
    """Decide to requeue exactly the runs that were asked to stop, saved, and made progress."""
    if ended.status == 0:
        return RestartDecision(then=Then.END, code=DONE, reason="done", exit_code=DONE, why="the run is complete")
    code, reason = _code_and_reason(ended)

    def end(why: str, exit_code: int = code) -> RestartDecision:
        return RestartDecision(then=Then.END, code=code, reason=reason, exit_code=exit_code, why=why)

    if ended.phase is Phase.ENDING:
        return end("Slurm is ending the job, and starts it again by itself if a node failed or another job needed it")
    if code != PREEMPTED_AND_SAVED:
        return end("not requeued: the run ended by its own fault")
    if ended.stop_file:
        return end("not requeued: the file STOP in the run folder asked for this; remove it and submit again")
    if ended.chain:
        return end("the next job of the chain goes on, or the same command submitted again")
    if ended.stalled > ended.max_stalled:
        return end(stall_text(ended.stalled), CRASHED)  # not 75: a site's RequeueExit would start it again
    why = "requeued: the same command continues"
    return RestartDecision(then=Then.REQUEUE, code=code, reason=reason, exit_code=code, why=why)


def follows_from(records: Sequence[dict[str, Any]], before: str) -> RestartDecision | None:
    """Decide whether a job of a chain ends at once, by how the job `before` it ended; None: it goes on."""
    last = next((record for record in reversed(records) if "ended" in record and record.get("job") == before), None)
    if last is None or last["code"] == PREEMPTED_AND_SAVED:  # a lost node says no last word
        return None
    code = last["code"]
    why = "the run is complete" if code == DONE else f"not continued: job {before} ended by its own fault"
    return RestartDecision(then=Then.END, code=code, reason=str(last.get("reason", "")), exit_code=code, why=why)


def stall_text(stalled: int) -> str:
    """Return why a job that does not get on is not started again."""
    return (
        f"not requeued: {stalled} starts in a row began at the same checkpoint and none wrote a newer one. Give it "
        "more time (--time), more notice (--signal=B:USR1@SECONDS), or save more often ([checkpoint] every_steps)"
    )


def read_exit(run_dir: Path) -> str | None:
    """Return the text of exit.json, to be compared before and after."""
    try:
        return (run_dir / "exit.json").read_text(encoding="utf-8")
    except OSError:
        return None


def record_of(before: str | None, after: str | None) -> dict[str, Any] | None:
    """Return what this start wrote; None when it wrote nothing: then the file speaks of an earlier one."""
    if after is None or after == before:
        return None
    record = parse_json_object(after)
    return record if record is not None and isinstance(record.get("code"), int) else None


def _code_and_reason(ended: JobEnd) -> tuple[int, str]:
    if ended.record is not None:
        return ended.record["code"], str(ended.record.get("reason", ""))
    if (
        ended.stop_requested
    ):  # nothing is lost but time: the last checkpoint is whole, and the count of starts limits this
        return PREEMPTED_AND_SAVED, "asked to stop, and ended without a word: not begun yet, or too slow to save"
    return CRASHED, f"the processes ended with status {ended.status} and left no reason (killed? out of memory?)"
