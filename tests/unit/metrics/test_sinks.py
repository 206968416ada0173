"""Where figures go: each sink writes what it was given, and none can end a run."""

import json
import resource
import sys
import time
import types
from pathlib import Path

import pytest

from distft.core.errors import MachineError
from distft.metrics.sinks.console import BarSink, LineSink
from distft.metrics.sinks.jsonl import JsonlSink
from distft.metrics.sinks.tensorboard import TensorboardSink
from distft.metrics.sinks.wandb import WandbSink


def record(step: int, **figures: float | None) -> dict:
    return {
        "step": step, "epoch": 0.5, "samples": 8 * step, "tokens": 100 * step, "tokens_loss": 40 * step,
        "loss": 2.25, "lr": 1e-4, "grad_norm": 0.5, "step_s": 0.1, "tokens_per_s": 12_345.6, "mfu": None,
        "memory_gib": 1.5,
    } | figures  # fmt: skip


EVALUATED = {"step": 2, "epoch": 0.5, "samples": 16, "tokens": 200, "tokens_loss": 80, "eval_loss": 1.5,
             "eval_tokens": 4_321.0}  # fmt: skip


@pytest.mark.parametrize("sink", [BarSink, LineSink])
def test_answers_alone_are_said_without_a_loss(sink: type, capsys: pytest.CaptureFixture[str]) -> None:
    own = sink("run", 10, 0)
    own.write({key: value for key, value in EVALUATED.items() if "eval_" not in key} | {"set.acc": 0.25})
    own.close()
    said = capsys.readouterr().err
    assert "set.acc 0.25" in said
    assert "loss" not in said


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------


@pytest.mark.row(22)
def test_jsonl_writes_one_line_at_once_and_numbers_that_json_has_not_as_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(record(1))
    assert json.loads(path.read_text()) == record(1), "readable before the run ends"
    sink.write(record(2, loss=float("nan"), grad_norm=float("inf"), mfu=float("-inf")))
    sink.close()
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.open()]
    assert [lines[1][key] for key in ("step", "loss", "grad_norm", "mfu")] == [2, "nan", "inf", "-inf"]


@pytest.mark.row(10)
def test_a_full_disk_costs_lines_never_the_run(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # a file may grow to one line
    try:
        for step in (2, 3):
            sink.write(record(step))
        sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "metrics.jsonl: a line was lost: [Errno 27] File too large" in caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == record(1)


# -- TensorBoard and W&B ---------------------------------------------------------------------------------------------


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(tmp_path)
    sink.write(record(1))
    sink.write(record(2, loss=2.0))
    sink.write(EVALUATED)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.25), (2, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval/eval_loss")] == [(2, 1.5)]
    assert events.Scalars("train/tokens_per_s")[0].value == pytest.approx(12_345.6)
    tags = events.Tags()["scalars"]
    assert "train/mfu" not in tags, "a figure that is not known has no point"
    assert "train/step" not in tags, "the step is the x axis"


def test_wandb_gets_the_recipe_and_every_known_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list = []

    class Run:
        def log(self, figures: dict, *, step: int) -> None:
            said.append((step, figures))

        def finish(self) -> None:
            said.append("finished")

    def init(**settings: object) -> Run:
        said.append(settings)
        return Run()

    stand_in = types.ModuleType("wandb")
    stand_in.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sink = WandbSink("project", "run", {"seed": 1})
    sink.write(record(1))
    sink.close()
    assert said[0] == {"project": "project", "name": "run", "config": {"seed": 1}}
    assert said[1] == (1, {key: value for key, value in record(1).items() if key != "mfu"})
    assert said[2] == "finished"


def test_wandb_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError, match=r"\[log\] wandb needs the wandb package: pip install \"distft\[wandb\]\""):
        WandbSink("project", "run", {})


# -- for people ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_say_step_total_loss_speed_and_time_left(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    sink = LineSink("my-run", 100, 0)
    clock[0] += 20.0
    sink.write(record(10, mfu=0.412))
    sink.write(record(11, loss=9.0))  # at once: too soon for another line
    clock[0] += 5.0
    sink.write(record(12))
    sink.write(EVALUATED)
    clock[0] += 1.0
    sink.write(record(100))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "my-run 10/100  loss 2.2500  norm 0.5  lr 1.00e-04  12,346 tok/s  mfu 41.2 %  1.5 GiB",
        "my-run 12/100  loss 2.2500  norm 0.5  lr 1.00e-04  12,346 tok/s  1.5 GiB  3 min 40 s left",
        "my-run 2/100  eval loss 1.5000 over 4,321 tokens",
        "my-run 100/100  loss 2.2500  norm 0.5  lr 1.00e-04  12,346 tok/s  1.5 GiB  0.0 s left",
    ]


def test_a_resumed_run_estimates_from_its_own_steps(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    sink = LineSink("run", 100, 90)
    clock[0] += 6.0
    sink.write(record(91))  # what came before the first step is no measure of the rest
    clock[0] += 6.0
    sink.write(record(92))
    assert capsys.readouterr().err.endswith("48 s left\n")


def test_the_bar_says_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    sink = BarSink("my-run", 100, 0)
    sink.write(record(10))
    sink.write(EVALUATED)
    sink.write(record(40))
    sink.close()
    said = capsys.readouterr().err
    assert "step 2  eval loss 1.5000 over 4,321 tokens" in said
    bar = next(line for line in said.splitlines() if "my-run" in line)
    for part in ("my-run", "40/100", "loss 2.2500", "12,346 tok/s", "left", ":"):
        assert part in bar, (part, bar)
