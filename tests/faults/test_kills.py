"""kill -9 at any moment: what was saved is still there, and the same command line ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from forks import Forks
from harness import STEPS, WHOLE_GRIDS, Bench, End, Job, until
from one_rank import OneRank

from distft.checkpoint.loading import load_path
from distft.core.errors import CheckpointError, HangError
from distft.health.heartbeat import is_dead

Oracle = Callable[..., End]
LOOP = ("data", "agree", "forward", "backward", "update", "step")
SAVE = [f"P{number}" for number in range(10)]
SYNC, ASYNC = "checkpoint.asynchronous=false", "checkpoint.asynchronous=true"
LATER = ";".join(f"slow:point=data,step={step},seconds=3" for step in (4, 5, 6))
"""Time to do something to a run in the middle of it."""
HANG = HangError.exit_code


def newest_valid(job: Job) -> int | None:
    """Step of the newest checkpoint that passes every check; nothing is touched, least of all what is half done."""
    for step in reversed(job.checkpoints()):
        with contextlib.suppress(CheckpointError):
            return load_path(job.folder / f"checkpoints/step-{step:08d}", OneRank()).step
    return None


def gone(job: Job, rank: int) -> str:
    """Where exit.json says that a killed rank was last seen."""
    told = job.exit()
    assert (told["code"], told["rank"]) == (HANG, 1 - rank), told
    who = f"hang: rank {rank} ({told['host']}, process {job.records()[rank].process['pid']}) is gone, last seen in "
    assert told["reason"].startswith(who), told
    return told["reason"].removeprefix(who).partition(";")[0]


def ends_as(expected: End, job: Job, forks: Forks) -> None:
    """The same command line, once more and left alone."""
    assert forks.run(job) == [0, 0], forks.stderr()
    assert job.result() == expected
    assert (job.exit()["code"], job.exit()["step"]) == (0, len(expected.losses))
    assert not list((job.folder / "checkpoints").glob(".tmp-*")), "nothing half done is left"
    assert not (job.folder / "lock.json").exists()


# -- a rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.row(1)
@pytest.mark.parametrize(
    ("seed", "engine"),
    [(1, "fsdp2"), *[pytest.param(seed, ("zero3", "fsdp2")[seed % 2], marks=pytest.mark.slow) for seed in range(2, 6)]],
)
def test_a_killed_rank_is_named_and_all_is_over_soon(
    bench: Bench, forks: Forks, oracle: Oracle, seed: int, engine: str
) -> None:
    chance = random.Random(seed)
    rank, step, point = chance.randrange(2), chance.randint(1, STEPS), chance.choice(LOOP)
    job = Job(bench, f"killed-{seed}", engine)
    with job.start(fault=f"kill:rank={rank},point={point},step={step}") as launch:
        until(lambda: rank in job.records() and is_dead(job.records()[rank]), said=launch.stderr)
        killed = time.monotonic()
        ended = launch.end()
        assert time.monotonic() - killed < 30
    assert ended.code != 0
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert gone(job, rank) == f"{point} of step {step}"
    ends_as(oracle(engine), job, forks)


@pytest.mark.slow
@pytest.mark.row(21)
def test_killed_between_two_micro_batches_of_a_step(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "accumulating")  # four micro-batches of one sequence on each rank
    assert forks.run(job, fault="kill:rank=1,point=forward,step=4,skip=2") == [HANG, -9]
    assert gone(job, 1) == "forward of step 4"
    assert newest_valid(job) == 2
    ends_as(oracle("zero3"), job, forks)


# -- a save ----------------------------------------------------------------------------------------------------------

SWEEPS = [(engine, rank, mode) for engine in ("zero3", "fsdp2") for rank in (0, 1) for mode in (SYNC, ASYNC)]
QUICK = [("zero3", 0, ASYNC)]


@pytest.mark.row(2)
@pytest.mark.parametrize(
    ("engine", "rank", "mode"),
    [pytest.param(*sweep, marks=() if sweep in QUICK else pytest.mark.slow) for sweep in SWEEPS],
)
def test_killed_at_every_point_of_a_save(
    bench: Bench, forks: Forks, oracle: Oracle, engine: str, rank: int, mode: str
) -> None:
    """One run: killed at P0 of the save of step 2, started again, killed at P1 of that of step 3, and so on to P9.

    The one sweep of make test has every third point.
    """
    points = SAVE if WHOLE_GRIDS or (engine, rank, mode) not in QUICK else SAVE[1::3]
    long = f"train.max_steps={len(points) + 2}"
    job = Job(
        bench, f"sweep-{engine}-{rank}-{mode.rpartition('=')[2]}", engine, (long, "checkpoint.every_steps=1", mode)
    )
    for step, point in enumerate(points, start=2):
        codes = forks.run(job, fault=f"kill:rank={rank},point={point},step={step}")
        assert (codes[rank], codes[1 - rank]) == (-9, HANG), (point, forks.stderr())
        gone(job, rank)
        saved = newest_valid(job)
        assert saved in (step - 1, step), (point, "the old one or the new one, never neither")
        if rank == 0:
            assert saved == (step if point in ("P7", "P8", "P9") else step - 1), point
        assert not (job.folder / "final").exists()
    ends_as(oracle(engine, long), job, forks)


@pytest.mark.row(9, 20)
def test_one_save_on_a_full_disk_is_survived(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "full-disk", settings=(SYNC,))
    assert forks.run(job, fault="enospc:rank=1,point=P2,step=4") == [0, 0]
    assert "step 4 was not saved: rank 1: disk full: need" in forks.stderr()
    assert "training goes on" in forks.stderr()
    assert job.checkpoints() == [2, 6]
    assert job.result() == oracle("zero3")
    written = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}
    assert forks.run(job) == [0, 0]
    assert "run full-disk is already complete" in forks.stderr()
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")} == written


@pytest.mark.row(11)
def test_a_flipped_byte_is_quarantined_and_the_one_before_is_used(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "flipped", "fsdp2", (SYNC,))
    assert forks.run(job, fault="kill:rank=1,point=step,step=5") == [HANG, -9]
    assert job.checkpoints() == [2, 4]
    newest = job.folder / "checkpoints/step-00000004"
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    ends_as(oracle("fsdp2"), job, forks)
    assert victim.name in forks.stderr(), "the bad file is named"
    assert list(newest.parent.glob(f"{newest.name}.corrupt-*")), "set aside, not deleted"


# -- the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.row(3)
def test_workers_of_a_killed_launcher_save_and_end(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "launcher")
    with job.start(fault=LATER) as launch:
        until(lambda: [record.place for record in job.records().values()] == 2 * ["data of step 4"], said=launch.stderr)
        os.kill(launch.process.pid, signal.SIGKILL)
        until(lambda: not launch.alive(), 60, launch.stderr)
    told = job.exit()
    assert told["code"] == 75
    assert "stopped by the launcher's end after step" in told["reason"]
    assert not (job.folder / "lock.json").exists()
    assert newest_valid(job) == told["step"] < STEPS
    ends_as(oracle("zero3"), job, forks)
