"""`distft status`: each state a run can be in, from files as the run leaves them."""

import json
import os
from pathlib import Path

import pytest

from distft import status

NOW = 1_800_000_000.0


class Folder:
    """A run folder in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def write(self, name: str, content: object) -> "Folder":
        (self.path / name).write_text(json.dumps(content))
        return self

    def steps(self, count: int) -> "Folder":
        records = [
            {"step": step, "loss": 5.0 - step, "tokens_per_s": 900.0, "step_s": 2.0} for step in range(1, count + 1)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in [*records, {"step": count, "eval_loss": 9.0}])
        (self.path / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')
        return self

    def beat(self, seconds_ago: float) -> "Folder":
        self.write("lock.json", {"host": "n1"})
        os.utime(self.path / "lock.json", (NOW - seconds_ago,) * 2)
        return self

    def starts(self, *records: dict) -> "Folder":
        (self.path / "starts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return self

    def checkpoint(self, step: int) -> "Folder":
        (self.path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        return self

    def read(self) -> status.Status:
        return status.read_status(self.path, now=NOW)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "runs/r").write("manifest.json", {"num_steps": 10, "slurm_job": None, "host": "n9"})


def start(restart: int, job: str = "7") -> dict:
    return {"job": job, "restart": restart, "nodes": ["n1", "n2"], "began": "…"}


def end(restart: int, code: int, reason: str, then: str, job: str = "7") -> dict:
    return {"job": job, "restart": restart, "code": code, "reason": reason, "then": then, "ended": "…"}


def test_a_running_run(folder: Folder) -> None:
    folder.steps(4).beat(5).starts(start(0)).checkpoint(2)
    found = folder.read()
    assert (found.state, found.step, found.num_steps, found.loss) == ("running", 4, 10, 1.0)
    assert (found.tokens_per_s, found.left_s, found.checkpoint) == (900.0, 12.0, 2)
    assert (found.job, found.nodes, found.restarts) == ("7", ["n1", "n2"], [])
    assert list(status.lines(found)) == [
        "r: running  step 4/10  loss 1.0000  900 tok/s  12 s left  checkpoint 2  job 7 on n1 n2"
    ]


def test_starting_again_it_runs_whatever_the_last_end_said(folder: Folder) -> None:
    folder.write("exit.json", {"code": 75, "reason": "preempted"}).beat(5)
    assert folder.read().state == "running"


def test_a_run_without_a_sign_of_life_is_lost(folder: Folder) -> None:
    found = folder.steps(4).beat(3700).read()
    assert found.state == "lost"
    assert "no sign of life for 1 h 01 min" in found.why
    assert found.left_s is None


def test_between_two_starts_it_is_queued_and_says_why(folder: Folder) -> None:
    said = "preempted: stopped by SIGUSR1 after step 4; the state is saved"
    folder.write("exit.json", {"code": 75, "reason": said})
    folder.starts(start(0), start(1), end(1, 75, said, "requeue"))
    found = folder.read()
    assert (found.state, found.why) == ("queued", said)
    assert found.restarts == ["node lost, or killed"], "the first start left no end"


def test_every_restart_has_its_reason(folder: Folder) -> None:
    folder.starts(start(0, job="6"), start(0), end(0, 75, "time", "requeue"), start(1), start(2)).beat(1)
    assert folder.read().restarts == ["time", "node lost, or killed"]
    assert "  restart 2: node lost, or killed" in list(status.lines(folder.read()))


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"code": 0, "reason": "done"}, "complete"),
        ({"code": 75, "reason": "preempted: by the file STOP"}, "stopped"),
        ({"code": 5, "reason": "numeric: loss nan"}, "failed"),
    ],
)
def test_how_it_ended(folder: Folder, record: dict, state: str) -> None:
    found = folder.write("exit.json", record).read()
    assert found.state == state
    assert found.why == ("" if state == "complete" else record["reason"])


def test_a_job_that_failed_without_an_exit_json(folder: Folder) -> None:
    folder.starts(start(0), end(0, 1, "the processes ended with status 137", "end"))
    assert (folder.read().state, folder.read().why) == ("failed", "the processes ended with status 137")


def test_one_run_or_a_folder_of_them(tmp_path: Path, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write("exit.json", {"code": 0, "reason": "done"}).steps(10)
    Folder(tmp_path / "runs/q").write("exit.json", {"code": 3, "reason": "data: a\nb"})
    Folder(tmp_path / "runs/not-a-run")
    assert status.main([str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "q: failed  step 0  no checkpoint",
        "  data: a",
        "r: complete  step 10/10  loss -5.0000  no checkpoint",
    ]
    assert status.main([str(folder.path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["state"], run["step"]) == ("r", "complete", 10)
    assert status.main([str(tmp_path / "runs/not-a-run")]) == 8
    assert "no run folder" in capsys.readouterr().err


def test_the_end_of_a_long_file_is_enough(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.steps(500)
    whole = folder.read()
    monkeypatch.setattr(status, "TAIL_BYTES", 1000)
    assert folder.read() == whole
    assert whole.step == 500


def test_what_the_run_itself_has_noted(folder: Folder) -> None:
    """Started by hand, so there is no file of starts: its own events tell of restarts, start-up and pace."""
    events: list[dict] = [
        {"event": "started", "step": 0},
        {"event": "startup", "step": 1, "total_s": 30.0},
        {"event": "slower", "step": 50, "what": "a step takes 2.00 s and took 1.00 s"},
        {"event": "started", "step": 40},
        {"event": "ended", "code": 6, "reason": "hang: rank 1 (node2, process 7) is gone"},
        {"event": "started", "step": 40},
        {"event": "startup", "step": 41, "total_s": 95.2},
        {"event": "pace", "step": 100, "rank": 3, "host": "node2", "percent": 4.2, "what": "waiting for its data"},
    ]

    def read() -> status.Status:
        (folder.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return folder.beat(1).read()

    found = read()
    assert found.restarts == ["killed, or its machine was lost", "hang: rank 1 (node2, process 7) is gone"]
    assert found.startup_s == 95.2
    told = list(status.lines(found))
    assert "  first step 1 min 35 s after the process's start" in told
    assert "  step 100: slowest is rank 3 (node2), 4.2 % behind the median for waiting for its data" in told
    events.append({"event": "slower", "step": 100, "what": "a step takes 2.00 s and took 1.00 s"})
    assert read().pace == "step 100: slower: a step takes 2.00 s and took 1.00 s"
