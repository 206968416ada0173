"""What Slurm exports into a batch script, read; ports; what it says of a job."""

import os
import socket
from pathlib import Path

import pytest

from distft.cluster import slurm
from distft.cluster.restart_policy import Phase
from distft.core.errors import MachineError

TWO = ("n1", "n2")


def given(**env: str) -> slurm.Allocation:
    return slurm.allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "32(x2)"} | env, TWO)


def test_one_process_per_gpu() -> None:
    found = given(SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="1")
    assert (found.per_node, found.gpus_per_node, found.cpus_per_node, found.cpus_per_process) == (8, 8, 32, 4)


def test_without_gpus_as_many_tasks_as_asked_for() -> None:
    assert given(SLURM_NTASKS_PER_NODE="2").per_node == 2
    assert given().per_node == 1


def test_the_poorest_node_sets_the_share_of_cpus() -> None:
    assert given(SLURM_JOB_CPUS_PER_NODE="96(x3),64", SLURM_GPUS_ON_NODE="8").cpus_per_process == 8
    assert given(SLURM_JOB_CPUS_PER_NODE="4", SLURM_GPUS_ON_NODE="8").cpus_per_process == 1


def test_the_first_start_has_no_count() -> None:
    assert given().restart == 0
    assert given(SLURM_RESTART_COUNT="2").restart == 2


def test_outside_of_a_job_it_says_how_to_get_into_one() -> None:
    with pytest.raises(MachineError, match=r"sbatch .options. cluster/train.sbatch RECIPE"):
        slurm.allocation({}, TWO)


def test_ports_differ_by_job_and_start_and_are_free() -> None:
    first = slurm.rendezvous_port("4711", 0)
    assert first in slurm.PORTS
    assert first == slurm.rendezvous_port("4711", 0), "derived, not drawn"
    assert len({first, slurm.rendezvous_port("4711", 1), slurm.rendezvous_port("4712", 0)}) == 3
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert slurm.rendezvous_port("4711", 0) not in (first,)
    assert slurm.rendezvous_port("4711_3", 0) in slurm.PORTS, "an array's task"


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its answers: the script that `scontrol` is."""
    script = tmp_path / "scontrol"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return script


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        ("JobState=RUNNING Reason=None", Phase.RUNNING),
        ("JobState=SIGNALING Reason=None", Phase.RUNNING),
        ("JobState=COMPLETING Reason=TimeLimit", Phase.TIME_LIMIT),
        ("JobState=COMPLETING Reason=None", Phase.ENDING),
        ("JobState=CANCELLED Reason=None", Phase.ENDING),
        ("JobState=PREEMPTED Reason=None", Phase.ENDING),
    ],
)
def test_what_slurm_does_with_a_job(controller: Path, said: str, phase: Phase) -> None:
    controller.write_text(f"#!/bin/sh\necho 'JobId=7 JobName=a=b {said} Dependency=(null)'\n")
    assert slurm.phase("7") is phase


def test_a_controller_that_is_away_for_a_moment_is_asked_again(controller: Path) -> None:
    controller.write_text('#!/bin/sh\necho x >>"$0.calls"\n[ "$(wc -l <"$0.calls")" -ge 3 ]\n')
    slurm.requeue("7", wait_s=0)
    assert controller.with_suffix(".calls").read_text() == "x\n" * 3


def test_a_refusal_carries_slurms_words(controller: Path) -> None:
    controller.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    with pytest.raises(MachineError, match="scontrol requeue 7: Requested operation is presently disabled"):
        slurm.requeue("7", attempts=2, wait_s=0)
