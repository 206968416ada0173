"""A real bench: two cases in one and two processes, killed after the first, continued; what its records hold."""

import json
import os
import signal
import sys
from typing import Any

import pytest
from harness import Bench, Launch, run, until

pytestmark = pytest.mark.dist

STEPS, WARMUP = 3, 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("bench"))


def command(bench: Bench, *more: str) -> list[str]:
    asked = ["--steps", str(STEPS), "--warmup", str(WARMUP), "--rows", "full", "--output", str(bench.folder / "out")]
    return [sys.executable, "-m", "distft.bench", str(bench.recipe), "--set", 'optim.name="adamw"', *asked, *more]


def kept(bench: Bench) -> dict[str, tuple[int, dict[str, Any]]]:
    """(when it was written, record) by file name."""
    files = (bench.folder / "out/cases").glob("*.json")
    return {path.name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in files}


@pytest.mark.slow
def test_killed_and_continued(bench: Bench) -> None:
    grid = ["--engines", "solo,zero3", "--micro", "2", "--nproc", "2"]
    with Launch(command(bench, *grid)) as first:
        until(lambda: kept(bench), 120, first.stderr)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        until(lambda: not first.alive(), 20, first.stderr)  # whatever it had started has ended with it
    before = kept(bench)
    assert len(before) == 1
    done = run(command(bench, *grid, "--json"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "1 of 2 cases are measured already" in done.stderr
    after = kept(bench)
    assert len(after) == 2
    assert all(after[name] == was for name, was in before.items()), "a finished case is not run again"
    check_records(json.loads(done.stdout)["records"])
    table = (bench.folder / "out/bench.md").read_text()
    assert "VOID" not in table
    assert "differs from the plan" not in table


def check_records(records: list[dict[str, Any]]) -> None:
    assert [(record["ran"]["engine"], record["ran"]["world"]) for record in records] == [("solo", 1), ("zero3", 2)]
    for record in records:
        assert record["outcome"] == "measured"
        speed, world = record["speed"], record["ran"]["world"]
        assert speed["tokens_per_s"] > speed["tokens_loss_per_s"] > 0
        assert speed["slots_per_s"] == pytest.approx(speed["tokens_per_s"]), "full rows have no filler"
        assert len(speed["steps_s"]) == STEPS
        assert speed["step_s"]["p10"] <= speed["step_s"]["median"] <= speed["step_s"]["p90"]
        assert speed["mfu"] is None, "a CPU has no peak to speak of"
        assert len(record["loss"]) == WARMUP + STEPS
        assert record["loss_check"]["equal"]
        assert record["loss_check"]["early"] < 1e-5
        assert len(record["ranks"]) == world
        for rank, planned in zip(record["ranks"], record["planned"]["state_by_rank"], strict=True):
            assert rank["held"] == planned, "state bytes are the planned ones, on every rank"
            assert rank["host"]["rss_peak_bytes"] > rank["tensors_bytes"] + rank["tensor_growth_bytes"]
            assert rank["tensor_growth_bytes"] > 0
    solo, zero3 = records
    assert sum(zero3["ranks"][0]["held"].values()) < sum(solo["ranks"][0]["held"].values())


def test_memory_that_runs_out_is_a_result(bench: Bench) -> None:
    done = run(command(bench, "--engines", "solo", "--micro", "8", "--limit-gib", "0.05", "--json"))
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = json.loads(done.stdout)["records"]
    assert record["outcome"] == "memory", record["reason"]
    assert record["planned"]["per_rank"]["weights_bytes"] > 0
    assert not list((bench.folder / "out/cases").glob(".*")), "nothing but records, recipes and logs is left"
