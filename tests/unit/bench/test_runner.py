"""A bench that was killed goes on where it was; a case that failed is tried again; failures are results."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_kit import became, cases
from harness import until

from distft.bench import case_launcher
from distft.bench.cases import BenchCase
from distft.bench.runner import Runner


class Fake:
    """Measures at once; killed at the case whose number is `dies_at`."""

    def __init__(self, dies_at: int | None = None, outcome: dict[str, Any] | None = None) -> None:
        self.ran: list[str] = []
        self._dies_at, self._outcome = dies_at, outcome

    def __call__(self, case: BenchCase, folder: Path) -> dict[str, Any]:
        if len(self.ran) == self._dies_at:
            raise KeyboardInterrupt
        self.ran.append(case.key)
        return self._outcome or became(case)


def test_a_killed_bench_goes_on_where_it_was(tmp_path: Path) -> None:
    listed = cases(tmp_path, methods=("full", "lora"), micros=(1, 2))
    said: list[str] = []
    first, second, third = Fake(dies_at=2), Fake(), Fake()
    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path / "out", first, said.append).all(listed)
    records = Runner(tmp_path / "out", second, said.append).all(listed)
    assert first.ran == [case.key for case in listed[:2]]
    assert second.ran == [case.key for case in listed[2:]]
    assert [record["key"] for record in records] == [case.key for case in listed]
    assert "2 of 4 cases are measured already" in "\n".join(said)
    assert Runner(tmp_path / "out", third, said.append).all(listed) == records
    assert not third.ran
    changed = cases(tmp_path, methods=("full", "lora"), micros=(1, 2), overrides=("seed=1",))
    Runner(tmp_path / "out", third, said.append).all(changed)
    assert len(third.ran) == 4, "another recipe is other cases"


def test_progress_and_the_time_left_are_shown(tmp_path: Path) -> None:
    said: list[str] = []
    Runner(tmp_path / "out", Fake(), said.append).all(cases(tmp_path, micros=(1, 2, 3)))
    assert said[0].startswith("[1/3] full, auto, micro-batch 1")
    assert said[1] == "[1/3] 10,000 tokens/s, 100.0 ms a step"
    assert "left" in said[2]
    assert "left" not in said[4], "what is refused takes no time"
    assert "[3/3] not possible" in said[5]


def test_memory_and_refusals_are_results_and_other_failures_are_tried_again(tmp_path: Path) -> None:
    listed = cases(tmp_path, micros=(1, 3))
    for outcome, tries in (("memory", 1), ("failed", 2)):
        folder, again = tmp_path / outcome, Fake(outcome={"outcome": outcome, "reason": "because"})
        for _ in range(2):
            records = Runner(folder, again, lambda line: None).all(listed)
        assert len(again.ran) == tries
        assert [record["outcome"] for record in records] == [outcome, "refused"]
        assert records[0]["reason"] == "because"


def test_a_record_says_with_what_it_was_made(tmp_path: Path) -> None:
    (record,) = Runner(tmp_path / "out", Fake(), lambda line: None).all(cases(tmp_path))
    assert json.loads(next((tmp_path / "out/cases").glob("*.json")).read_text()) == record
    assert {"schema", "date", "code", "hardware", "versions", "case", "speed", "ranks", "loss"} <= set(record)
    assert record["versions"]["torch"]
    assert record["hardware"]["cores"] >= 1
    assert record["code"]["source_sha256"]


# -- processes -------------------------------------------------------------------------------------------------------

SLEEPS = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"


def alive(session: int) -> bool:
    """Whether a process of this session still runs; one that waits for its parent to take note does not."""
    command = ["ps", "-o", "stat=", "--sid", str(session)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return any(not state.startswith("Z") for state in said.split())


def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    began = time.monotonic()
    code = case_launcher.start([sys.executable, "-c", SLEEPS], tmp_path / "log", timeout_s=0.5)
    assert code is None
    assert time.monotonic() - began < 10


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    real = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not groups:
            groups.append(self.pid)
            time.sleep(0.3)
            raise KeyboardInterrupt
        return real(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        case_launcher.start([sys.executable, "-c", SLEEPS], tmp_path / "log", timeout_s=60)
    monkeypatch.undo()
    until(lambda: not alive(groups[0]), 5.0)


@pytest.mark.parametrize(
    ("code", "said", "printed", "outcome"),
    [
        (1, {"kind": "memory", "reason": "tried to allocate 5 bytes"}, "", "memory"),
        (1, {"kind": "refused", "reason": "engine solo runs in 1 process"}, "", "refused"),
        (1, {"kind": "failed", "reason": "KeyError: x"}, "", "failed"),
        (1, {"kind": "failed", "reason": "peer"}, "terminate called: std::bad_alloc", "memory"),
        (127, None, "cannot allocate memory for thread-local data: ABORT", "memory"),
        (1, None, "OSError: [Errno 12] Cannot allocate memory", "memory"),
        (-signal.SIGKILL, None, "", "memory"),
        (3, None, "some last words", "failed"),
        (None, None, "", "failed"),
    ],
)
def test_why_a_case_ended(tmp_path: Path, code: int | None, said: dict | None, printed: str, outcome: str) -> None:
    log, failure = tmp_path / "case.log", tmp_path / "failed"
    log.write_text(printed)
    if said is not None:
        failure.write_text(json.dumps(said))
    found = case_launcher._became(code, [tmp_path / "no such file", failure], log, 60.0)
    assert found["outcome"] == outcome
    assert (said["reason"] if said and said["kind"] == outcome else printed) in found["reason"]
