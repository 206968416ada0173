"""Asked to stop, by whom and when it may be: all ranks save the same step and end with 75, and nothing is lost."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from harness import STEPS, WHOLE_GRIDS, Bench, End, Job, Run, run, until

from distft.core.errors import PREEMPTED_AND_SAVED

Oracle = Callable[..., End]
SYNC = "checkpoint.asynchronous=false"


def stopped(job: Job, reason: str, *, after: int | None) -> None:
    """Every rank has ended with 75, for this reason, after this step."""
    told = job.exit()
    assert (told["code"], told["step"]) == (PREEMPTED_AND_SAVED, after), told
    assert reason in told["reason"]
    assert {rank: record.ended for rank, record in job.records().items()} == {0: 75, 1: 75}


# -- in one pair of processes ----------------------------------------------------------------------------------------

STOPS = {
    # name: (fault, signal, step that is saved)
    "first-step": ("term:rank=1,point=forward,step=1", "SIGTERM", 1),
    "one-rank": ("term:rank=0,point=backward,step=3", "SIGTERM", 3),
    "evaluation": ("int:rank=1,point=eval,step=2", "SIGINT", 2),
    "mid-save": ("term:rank=1,point=P3,step=4", "SIGTERM", 4),
    "every-rank": ("usr1:point=update,step=5", "SIGUSR1", 5),
    "twice": ("term:rank=0,point=update,step=3;int:rank=0,point=P2,step=3", "SIGTERM", 3),
}
if not WHOLE_GRIDS:
    STOPS = {name: STOPS[name] for name in ("evaluation", "mid-save", "twice")}
BASE = ['engine.name="zero3"', "train.micro_batch_size=1", "checkpoint.every_steps=2", SYNC, "eval.every_steps=2"]


@pytest.fixture(scope="module")
def stops(bench: Bench) -> dict[str, Run]:
    """Each case stopped, then the same recipe again; and an uninterrupted run, with a slow rank and without."""
    cases: dict[str, list[str]] = {"oracle": BASE}
    extra: dict[str, dict[str, str]] = {}
    for name, (fault, *_) in STOPS.items():
        cases[name] = BASE
        cases[f"{name}-again"] = [*BASE, f'name="stops-{name}"']
        extra[name] = {"fault": f"{fault};raise:point={name}"}  # the last part never fires: it makes the text unique
    cases["slow-rank"] = [*BASE, "guard.straggler.every_steps=2"]
    extra["slow-rank"] = {"fault": "slow:rank=1,point=data,seconds=0.1,times=99"}
    return bench.launch(2, cases, tag="stops", extra=extra)


@pytest.mark.row(4, 5, 6, 8)
@pytest.mark.parametrize("name", STOPS)
def test_all_ranks_stop_at_one_step_and_the_same_command_continues(
    bench: Bench, stops: dict[str, Run], name: str
) -> None:
    _, number, step = STOPS[name]
    said = f"Preempted: stopped by {number} after step {step}; the state is saved"
    assert said in stops[name].error
    folder = bench.folder / f"runs/stops-{name}"
    again, whole = stops[f"{name}-again"], stops["oracle"]
    for column in ("loss", "grad_norm", "lr", "tokens"):
        assert again.column(column) == whole.column(column), column
    evals, wanted = ({said["step"]: said["eval_loss"] for said in run.evals} for run in (again, whole))
    assert evals == wanted
    assert tensors(folder) == tensors(bench.folder / "runs/stops-oracle")


def tensors(folder: Path) -> bytes:
    return (folder / "final/model.safetensors").read_bytes()


@pytest.mark.row(42)
def test_a_slow_rank_is_named_and_left_alone(bench: Bench, stops: dict[str, Run]) -> None:
    assert stops["slow-rank"].column("loss") == stops["oracle"].column("loss")
    events = [line for line in events_of(bench.folder / "runs/stops-slow-rank") if line["event"] == "straggler"]
    assert events
    host = os.uname().nodename
    for event in events:
        assert event["what"].startswith(f"rank 1 ({host}, cpu) took ")
        assert "waiting for its data" in event["what"]
    paces = [line for line in events_of(bench.folder / "runs/stops-slow-rank") if line["event"] == "pace"]
    assert [pace["step"] for pace in paces] == [2, 4, 6], "one for every look"
    assert {(pace["rank"], pace["host"]) for pace in paces} == {(1, host)}
    assert all(pace["took_ms"] > pace["others_ms"] for pace in paces)
    assert not [line for line in events_of(bench.folder / "runs/stops-oracle") if line["event"] == "straggler"]


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


# -- with processes of their own -------------------------------------------------------------------------------------


@pytest.mark.row(5)
def test_asked_before_anything_is_imported(bench: Bench) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "distft.train", str(bench.recipe), "--set", 'name="import"']
    done = run(command, DISTFT_FAULT="term:point=import")
    assert done.returncode == 75
    assert "stopped by SIGTERM before training began (rows), so there is nothing to save" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bench.folder / "runs/import/lock.json").exists()
    assert " torch\n" not in done.stderr, "it did not wait for the heavy imports either"


@pytest.mark.row(4)
@pytest.mark.slow
def test_a_stop_file_or_one_ranks_sigterm_stops_and_the_same_command_continues(bench: Bench, oracle: Oracle) -> None:
    """Under torchrun, which makes its own code of everything: exit.json has the true one."""
    job = Job(bench, "stopped")
    job.folder.mkdir(parents=True)
    (job.folder / "STOP").touch()
    assert job.run().code != 0
    stopped(job, f"stopped by the file {job.folder / 'STOP'} before training began (rows)", after=None)
    (job.folder / "STOP").unlink()
    assert job.run(fault="term:rank=1,point=step,step=3").code != 0
    stopped(job, "stopped by SIGTERM after step 3; the state is saved", after=3)
    assert job.checkpoints() == [2, 3]
    assert job.run().code == 0
    assert job.result() == oracle("zero3")
    assert job.exit()["step"] == STEPS


@pytest.mark.slow
@pytest.mark.row(6)
def test_usr1_to_every_process_leaves_no_orphans(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    """As Slurm signals a step: torchrun too, which the batch script made deaf to it."""
    job = Job(bench, "usr1")
    with job.start(fault="slow:point=data,seconds=0.3,times=99", ignoring_usr1=True) as launch:
        until(lambda: [record.step >= 2 for record in job.records().values()] == [True, True], said=launch.stderr)
        for pid in launch.alive():
            os.kill(pid, signal.SIGUSR1)
        ended = launch.end()
    assert ended.code != 0
    stopped(job, "stopped by SIGUSR1 after step", after=job.exit()["step"])
    assert job.checkpoints()[-1] == job.exit()["step"] < STEPS
    assert forks.run(job) == [0, 0]
    assert job.result() == oracle("zero3")


BEFORE_TRAINING = {
    "term:point=rows,skip=1": "(rows)",  # in the middle of them, whichever rank prepares
    "term:rank=0,point=rows": "(rows)",
    "int:rank=1,point=weights": "(weights)",
    "usr1:rank=0,point=restore": "(restore)",
}
WHILE_TRAINING = {
    "term:rank=0,point=forward,step=1": 1,
    "term:rank=1,point=eval,step=2": 2,
    "term:rank=0,point=P5,step=4": 4,
    "int:rank=1,point=update,step=5": 5,
}
if not WHOLE_GRIDS:  # the stops above are in the middle of training
    del BEFORE_TRAINING["term:rank=0,point=rows"]
    WHILE_TRAINING = {"term:rank=0,point=forward,step=1": 1}


@pytest.mark.row(5)
def test_one_run_asked_in_every_phase(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    """Started again by the same command line each time, it ends as the oracle."""
    cache = f'data.cache_dir="{bench.folder}/asked-cache"'  # of its own, so that the first start prepares the rows
    job = Job(bench, "asked", settings=(SYNC, "eval.every_steps=2", cache, "guard.hang_timeout_s=30"))
    for fault, phase in BEFORE_TRAINING.items():
        assert forks.run(job, fault=fault) == [75, 75], (fault, forks.stderr())
        stopped(job, f"before training began {phase}", after=None)
    for fault, step in WHILE_TRAINING.items():
        assert forks.run(job, fault=fault) == [75, 75], (fault, forks.stderr())
        stopped(job, f"after step {step}; the state is saved", after=step)
        assert job.checkpoints()[-1] == step
    assert "Traceback" not in forks.stderr()
    assert forks.run(job) == [0, 0]
    assert job.result() == oracle("zero3")


@pytest.mark.row(7)
def test_a_grace_shorter_than_the_save(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    """Warned of at the first save; killed in the middle of the last one, its remains are ignored."""
    job = Job(bench, "grace", settings=(SYNC, "checkpoint.grace_s=0.001"))
    codes = forks.run(job, fault="term:rank=0,point=update,step=3;kill:rank=0,point=P3,step=3")
    assert codes == [-9, 6]
    assert forks.stderr().count("s and the grace before a kill is 0.0 s: give more time, or save more often") == 1
    assert (job.folder / "checkpoints/.tmp-step-00000003").is_dir()
    assert job.checkpoints() == [2]
    assert forks.run(job) == [0, 0]
    assert job.result() == oracle("zero3")
    assert not list((job.folder / "checkpoints").glob(".*"))


@pytest.mark.row(8)
def test_the_second_signal_asks_again_and_the_third_ends_at_once(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "impatient", settings=(SYNC,))
    assert forks.run(job, fault="term:rank=1,point=update,step=3;int:rank=1,point=P3,step=3") == [75, 75]
    stopped(job, "stopped by SIGTERM after step 3; the state is saved", after=3)
    assert job.checkpoints() == [2, 3]
    codes = forks.run(
        job, fault="term:rank=1,point=update,step=5;int:rank=1,point=P2,step=5;term:rank=1,point=P3,step=5"
    )
    assert codes == [6, 128 + signal.SIGTERM], "from inside the handler"
    assert job.checkpoints() == [2, 3, 4], "the save it was in the middle of is not there"
    assert forks.run(job) == [0, 0]
    assert job.result() == oracle("zero3")
