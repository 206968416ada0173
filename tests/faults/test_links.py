"""A run on two hosts with one cable between them, which is slowed, cut for a moment, and cut for good."""

import datetime
import json
import os
import time
from collections.abc import Callable

import pytest
from harness import Bench, End, Job, Launch, Run, until
from hosts import Wire, can_isolate, can_wire

from distft.core.errors import HangError

Oracle = Callable[..., End]
STEPS = "train.max_steps=8"
TIMEOUT_S = 20
"""Longer than anything takes that a rank does alone, imports on a busy machine among them."""
BEAT_S = TIMEOUT_S / 6
LIMIT = f"guard.hang_timeout_s={TIMEOUT_S}"
LOADED_S = 20
"""Machines that run tests have other things to do."""
CUT_S = 5.0
PAUSE_S = 2
LOOKS = ("guard.straggler.every_steps=1", "guard.straggler.factor=3")


@pytest.fixture(autouse=True)
def two_networks() -> None:
    if can_isolate() and can_wire():
        return
    why = "needs root, unshare, ip and tc to make two hosts with networks of their own"
    if os.environ.get("REQUIRE_NETWORKS") == "1":
        pytest.fail(f"REQUIRE_NETWORKS=1, and this {why}")
    pytest.skip(why)


def is_in(job: Job, step: int) -> Callable[[], bool]:
    """Whether both ranks are in that step, or later ones."""
    return lambda: [record.step >= step for record in job.records().values()] == [True, True]


def pauses(*steps: int) -> str:
    """Both ranks stop for PAUSE_S before these steps: time to do something to the cable."""
    return ";".join(f"slow:point=data,step={step},seconds={PAUSE_S}" for step in steps)


def said_by(hosts: list[Launch]) -> Callable[[], str]:
    return lambda: "".join(host.stderr() for host in hosts)


def adds_up(job: Job, events: list[dict], printed: str) -> None:
    """The start is told once, by phase, and the phases are the time since the process was started."""
    (start,) = [event for event in events if event["event"] == "startup"]
    first = job.records()[0].process["process_start"] / os.sysconf("SC_CLK_TCK")  # seconds since boot
    told = datetime.datetime.fromisoformat(start["time"]).timestamp() - (
        time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    )
    assert abs(told - first - start["total_s"]) < 1.5, "events have whole seconds"
    assert abs(sum(start["seconds"].values()) - start["total_s"]) < 0.02
    assert list(start["seconds"])[:4] == ["imports", "start", "rows", "fetch"]
    assert set(start["seconds"]) >= {"join", "model", "weights", "restore", "first_step"}
    assert {(one["rank"], one["host"]) for one in start["slowest"].values()} <= {(0, "node1"), (1, "node2")}
    assert all(start["slowest"][phase]["s"] >= seconds for phase, seconds in start["seconds"].items())
    assert f"first step {start['total_s']:.1f} s after the process's start: imports " in printed


@pytest.mark.slow
@pytest.mark.row(42)
def test_a_slow_link_is_seen_and_a_short_cut_is_survived(bench: Bench, oracle: Oracle) -> None:
    job = Job(bench, "slow-link", settings=(LIMIT, STEPS, *LOOKS))
    with Wire() as wire, wire.launched(job, fault=pauses(4, 6, 8)) as hosts:
        said = said_by(hosts)
        until(is_in(job, 4), 120, said)
        wire.slow("16mbit")
        until(is_in(job, 6), 120, said)
        wire.free()
        until(is_in(job, 8), 60, said)
        wire.cut()
        time.sleep(CUT_S)
        assert job.checkpoints()[-1] < 8, "it waits"
        assert not (job.folder / "exit.json").exists()
        wire.heal()
        assert [host.end().code for host in hosts] == [0, 0], said()
        printed = said()
    assert job.exit()["code"] == 0
    took = dict(enumerate(Run.read({"folder": str(job.folder)}).column("step_s"), start=1))
    assert took[5] > 5 * max(took[2], took[3]), took
    assert took[7] < took[5] / 3, "as before once the link is"
    assert took[8] > CUT_S - PAUSE_S
    events = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    slower = {event["step"]: event["what"] for event in events if event["event"] == "slower"}
    assert {4, 5} <= set(slower)
    assert 7 not in slower
    assert "look at the network" in slower[5] or "straggler" in {event["event"] for event in events}
    assert f"slower: {slower[5]}" in printed
    adds_up(job, events, printed)
    assert job.result() == oracle("zero3", STEPS), "nothing was lost and nothing came twice"


@pytest.mark.slow
@pytest.mark.row(41)
def test_a_link_that_is_cut_for_good_ends_both_sides(bench: Bench, oracle: Oracle) -> None:
    job = Job(bench, "cut-link", "fsdp2", settings=(LIMIT, STEPS))
    with Wire() as wire, wire.launched(job, fault=pauses(6)) as hosts:
        until(is_in(job, 6), 120, said_by(hosts))
        began = time.monotonic()
        wire.cut()
        codes = [host.end(TIMEOUT_S + 4 * BEAT_S + PAUSE_S + LOADED_S).code for host in hosts]
        took = time.monotonic() - began
    assert took > TIMEOUT_S - BEAT_S, "not before its time"
    assert codes == [1, 1], "torchrun makes 1 of any"
    ended = job.exit()
    assert (ended["code"], ended["step"]) == (HangError.exit_code, 5)
    assert "no progress for 2" in ended["reason"]
    assert "the network between node1 and node2" in ended["reason"]
    for rank, record in job.records().items():
        assert record.ended == HangError.exit_code, record
        assert record.process["host"] == f"node{rank + 1}"
        assert "node1" in record.reason
        assert "in fit" in (job.folder / f"ranks/0000{rank}.stacks.txt").read_text()
    assert job.checkpoints() == [2, 4]
    with Wire() as wire, wire.launched(job) as hosts:
        assert [host.end().code for host in hosts] == [0, 0], said_by(hosts)()
        assert "continuing" in said_by(hosts)()
    assert job.result() == oracle("fsdp2", STEPS)
