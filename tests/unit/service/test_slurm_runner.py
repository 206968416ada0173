"""What people are told of a batch job, of what squeue writes; the real Slurm is in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.core.errors import MachineError
from distft.service.job_folder import JobFolder
from distft.service.runner import RunnerState
from distft.service.settings import ServiceLimits, ServiceSettings
from distft.service.slurm_runner import SlurmRunner

NAME = "ftjob-1"


def state_of(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunnerState | None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{line}'\n", encoding="utf-8")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    runner = SlurmRunner(ServiceSettings(data=tmp_path, models={}, limits=ServiceLimits(), runner="slurm"))
    folder = JobFolder(path=tmp_path / "jobs" / NAME)
    alive = runner.is_alive(folder, None)
    state = runner.state(folder, None)
    assert alive == (state is not None)
    return state


@pytest.mark.parametrize(
    ("cells", "waits", "words", "event"),
    [
        ("PENDING|0|N/A||Resources", True, "queued in Slurm as job 12: Resources", "Queued in Slurm as job 12."),
        ("RUNNING|0|N/A|node1|None", False, "Slurm runs job 12 on node1", "Slurm started job 12 on node1."),
        ("RUNNING|0|2026-11-30T10:00:00|node1|None", False, "preempted: Slurm takes the nodes of job 12, which saves",
         "Preempted: Slurm takes the nodes of job 12 for another one. It saves, and waits in the queue again."),
        ("PENDING|1|N/A||BeginTime", True, "back in the queue of Slurm as job 12: BeginTime",
         "Slurm put job 12 back into its queue; it goes on from its last checkpoint."),
        ("RUNNING|1|N/A|node2|None", False, "Slurm runs job 12 on node2, restart 1",
         "Slurm restarted job 12 on node2, restart 1."),
    ],
)  # fmt: skip
def test_where_a_batch_job_stands_is_said_in_words(
    cells: str, waits: bool, words: str, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "|".join(cell.ljust(16) for cell in f"{NAME}|12|{cells}|".split("|"))
    state = state_of(line, tmp_path, monkeypatch)
    assert state is not None
    assert (state.waits, state.words, state.event) == (waits, words, event)
    assert state.is_setback == ("Preempted" in event or "back" in event)


def test_what_squeue_does_not_say_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_of(f"other-{NAME}|12|RUNNING|0|N/A|node1|None|", tmp_path, monkeypatch) is None
    assert state_of("", tmp_path, monkeypatch) is None, "an empty queue"
    with pytest.raises(MachineError, match="no line of Name"):
        state_of(f"{NAME} 12 RUNNING", tmp_path, monkeypatch)
