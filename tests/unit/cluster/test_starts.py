"""The history of starts: what counts as getting on, and what a torn or missing file does."""

from pathlib import Path

import pytest

from distft.cluster.starts import End, JobStart, Starts


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


def begin(starts: Starts, job: str = "7", restart: int = 0) -> None:
    now = starts.checkpoint()
    starts.add(JobStart(job=job, restart=restart, nodes=["n1"], processes=8, checkpoint=now))


def save(run_dir: Path, step: int) -> None:
    (run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)


def test_the_newest_committed_checkpoint(tmp_path: Path, starts: Starts) -> None:
    assert starts.checkpoint() == 0
    save(tmp_path, 4)
    save(tmp_path, 20)
    (tmp_path / "checkpoints/.tmp-step-00000030").mkdir()
    (tmp_path / "checkpoints/step-00000040.corrupt-1").mkdir()
    assert starts.checkpoint() == 20


def test_starts_at_the_same_checkpoint_add_up(tmp_path: Path, starts: Starts) -> None:
    assert starts.stalled("7") == 0
    for restart in range(3):
        begin(starts, restart=restart)
        starts.add(End(job="7", restart=restart, code=75, reason="preempted", checkpoint=0, then="requeue"))
    assert starts.stalled("7") == 3
    save(tmp_path, 4)
    assert starts.stalled("7") == 0, "it has got on"
    begin(starts, restart=3)
    assert starts.stalled("7") == 1


def test_a_lost_node_leaves_a_start_without_an_end_and_counts(starts: Starts) -> None:
    begin(starts)
    begin(starts, restart=1)
    assert starts.stalled("7") == 2


def test_another_job_is_another_try(starts: Starts) -> None:
    begin(starts, job="7")
    begin(starts, job="7", restart=1)
    assert starts.stalled("8") == 0
    begin(starts, job="8")
    assert starts.stalled("8") == 1
    assert starts.stalled("7") == 2


def test_torn_lines_are_left_out(tmp_path: Path, starts: Starts) -> None:
    begin(starts)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"job": "7", "rest\n[1]\n')
    begin(starts, restart=1)
    assert [record["restart"] for record in starts.records()] == [0, 1]
    assert starts.stalled("7") == 2


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    begin(Starts(tmp_path / "absent"))
    assert Starts(tmp_path / "absent").records() == []
