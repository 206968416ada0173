"""A run that no longer gets on is ended within the recipe's timeout, and says which rank held it up and where."""

import os
import pickle
import re
import signal
import time
from collections.abc import Callable

import pytest
from forks import Forks
from harness import Bench, End, Job, until

from distft.core.errors import HangError

Oracle = Callable[..., End]
TIMEOUT_S = 12.0
BEAT_S = TIMEOUT_S / 6
LIMIT = f"guard.hang_timeout_s={TIMEOUT_S}"
LOADED = 3
"""Machines that run tests have other things to do: promised times are stretched by this."""


@pytest.mark.row(41)
@pytest.mark.parametrize(
    ("kind", "blamed"),
    [
        pytest.param("stop", r"shows no sign of life, last seen in forward of step 3", marks=pytest.mark.slow),
        ("hang", r"is stuck in forward of step 3 \(at faults.py:\d+ _fire\), the others wait for it"),
        pytest.param(
            *("spin", r"(is gone|shows no sign of life), last seen in forward of step 3"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(
    bench: Bench, forks: Forks, oracle: Oracle, kind: str, blamed: str
) -> None:
    job = Job(bench, f"hang-{kind}", settings=(LIMIT,))
    forks.start(job, fault=f"{kind}:rank=1,point=forward,step=3,skip=1")
    until(lambda: 1 in job.records() and job.records()[1].place == "forward of step 3")
    silent = time.monotonic()
    until(lambda: (job.folder / "exit.json").exists())
    took = time.monotonic() - silent
    pid = job.records()[1].process["pid"]
    if kind == "stop":
        os.kill(pid, signal.SIGKILL)  # a launcher does that
    codes = forks.codes()
    assert codes[0] == HangError.exit_code == 6
    assert codes[1] == {"stop": -signal.SIGKILL, "hang": 6, "spin": 1}[kind]
    assert TIMEOUT_S - BEAT_S <= took < LOADED * (TIMEOUT_S + 4 * BEAT_S)
    told = job.exit()
    assert told["code"] == 6
    assert re.search(rf"rank 1 \({told['host']}, process {pid}\) {blamed}", told["reason"]), told
    stacks = [job.folder / f"ranks/0000{rank}.stacks.txt" for rank in range(2)]
    if kind != "stop":  # it lives, so it tells
        assert "in _fire" in stacks[1].read_text()
    if (
        kind != "spin" or "no progress" in told["reason"]
    ):  # else its end freed the other, perhaps before that one's time
        assert "in fit" in stacks[0].read_text(), "where the living rank stood"
        trace = pickle.loads((job.folder / "ranks/collectives-0").read_bytes())
        assert trace["entries"], "its last collectives, for torch's own analysis"
    assert forks.run(job) == [0, 0], forks.stderr()
    assert job.result() == oracle("zero3")


@pytest.mark.slow
@pytest.mark.row(29)
def test_preparing_rows_for_longer_than_the_timeout_is_no_hang(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    """As long as it gets on: one rank works, a file at a time, the other waits without a process group."""
    lines = (bench.folder / "train.jsonl").read_text().splitlines(keepends=True)
    parts = bench.folder / "parts"
    parts.mkdir()
    for number in range(0, len(lines), 8):
        (parts / f"{number:03d}.jsonl").write_text("".join(lines[number : number + 8]))
    cache = f'data.cache_dir="{bench.folder}/parts-cache"'
    job = Job(bench, "slow-rows", settings=(LIMIT, f'data.train.0.path="{parts}"', cache))
    began = time.monotonic()
    assert forks.run(job, fault="slow:point=rows,seconds=2,times=99") == [0, 0], forks.stderr()
    assert time.monotonic() - began > 8 * 2 > TIMEOUT_S, "the rows alone took longer than the timeout"
    assert not list((job.folder / "ranks").glob("*.stacks.txt"))
    assert job.result() == oracle("zero3"), "the same rows in eight files"
