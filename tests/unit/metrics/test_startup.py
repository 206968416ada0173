"""How a start is told: every second in one phase, the slowest rank named, no word about later steps."""

import time
from typing import Any

import pytest

from distft.core import host
from distft.core.phase import PHASE
from distft.core.types import StepReport, TrainState
from distft.metrics import startup
from distft.metrics.startup import StartUp, StartupTimes, launched_s, phases, slowest, text


@pytest.fixture(autouse=True)
def begun():
    PHASE.begin()
    yield
    PHASE.begin()


def start(rank: int, **seconds: float) -> StartupTimes:
    return StartupTimes(rank=rank, host=f"node{rank // 2}", seconds=seconds)


def test_phases_add_up_to_the_age_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PHASE, "runs", 1)
    PHASE.enter("rows")
    time.sleep(0.02)
    for phase in ("join", "data", "agree", "forward", "backward", "update"):
        PHASE.enter(phase)
    found = phases()
    assert list(found) == ["imports", "start", "rows", "join", "first_step"]
    assert found["rows"] >= 0.02
    assert sum(found.values()) == pytest.approx(host.age_s(), abs=0.05)
    monkeypatch.setattr(PHASE, "runs", 2)
    assert "imports" not in phases(), "of a second run in one process nothing was imported"


def test_the_slowest_rank_of_each_phase_is_named_where_it_matters() -> None:
    ranks = [start(0, imports=9.0, rows=0.4, first_step=1.0), start(3, imports=9.5, rows=6.0, first_step=1.0)]
    worst = slowest(ranks)
    assert {phase: one.rank for phase, one in worst.items()} == {"imports": 3, "rows": 3, "first_step": 0}
    assert text(ranks[0], worst, 12.25) == (
        "first step 10.4 s after the process's start, which came 12.2 s after the job's: "
        "imports 9.0, rows 0.4 (rank 3 on node1: 6.0), first step 1.0"
    )


def test_it_is_told_once_a_run() -> None:
    said: list[str] = []
    noted: list[dict[str, Any]] = []
    state = TrainState(step=7, samples=1, tokens=1, tokens_loss=1)
    report = StepReport(step=7, loss=1.0, grad_norm=1.0, lr=1.0, denominator=1.0, updated=True, samples="")

    def told() -> StartUp:
        return StartUp(0, lambda mine: [mine], said.append, lambda event, **facts: noted.append(facts), {})

    first = told()
    first.step(state, report)
    first.step(state, report)
    told().step(state, report)  # after the run has gone back to a checkpoint
    assert len(said) == len(noted) == 1
    assert noted[0]["step"] == 7
    assert sum(noted[0]["seconds"].values()) == pytest.approx(noted[0]["total_s"], abs=0.01)
    PHASE.begin()
    told().step(state, report)
    assert len(said) == 2


def test_since_the_jobs_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.host, "age_s", lambda: 5.0)
    began = {"SLURM_JOB_START_TIME": str(int(time.time()) - 65)}
    assert launched_s(began) == pytest.approx(60, abs=1.5)
    assert launched_s({"SLURM_JOB_START_TIME": str(int(time.time()) + 60)}) == 0, "a clock that is behind"
    assert launched_s({host.JOB_START: str(int(time.time()) - 35)}) == pytest.approx(30, abs=1.5), "Slurm 22.05"
    assert launched_s({}) is None
