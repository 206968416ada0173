"""The driver of the first hour: what fails, is late, cannot be here or is wrong is kept, and stops nothing."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks.first_hour import calibration, driver, report_lines
from benchmarks.first_hour.phase import Context, Measured, NotHere, OutOfTime, Phase, Step, StepFailed, Table
from benchmarks.first_hour.phases import PHASES


def raising(error: Exception) -> Any:
    def run() -> Measured:
        raise error

    return run


class Counted:
    """A step that can be told apart from its second run."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Measured:
        self.times += 1
        return {"value": self.times}


def phase(name: str, *steps: Step, share: float = 1.0, why_not: str = "", wrong: tuple[str, ...] = ()) -> Phase:
    def all_steps(context: Context) -> Iterator[Step]:
        yield from steps

    def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
        yield Table(
            caption="found", heads=("step", "value"), rows=[(key, str(value)) for key, value in measured.items()]
        )

    all_steps.__module__ = __name__
    return Phase(name=name, title=f"Phase {name}", share=share, steps=all_steps, show=show,
                 why_not=lambda context: why_not, wrong=lambda measured: iter(wrong))  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def started(*phases: Phase, seconds: float = 60.0, gpus: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(driver, "PHASES", {one.name: one for one in phases})
        context = Context(out=tmp_path, gpus=gpus, ranks=2)
        return driver.Hour(context, list(phases), seconds, "command").run()

    return started


def record(out: Path, name: str) -> dict[str, Any]:
    (path,) = out.glob(f"[0-9][0-9]-{name}.json")
    return json.loads(path.read_text())


def test_what_fails_stops_nothing_and_only_it_is_tried_again(run: Any, tmp_path: Path) -> None:
    first, last = Counted(), Counted()
    steps = [
        Step(name="first", run=first),
        Step(name="fails", run=raising(StepFailed("it broke"))),
        Step(name="crashes", run=raising(KeyError("missing"))),
        Step(name="not here", run=raising(NotHere("no such kernel"))),
        Step(name="late", run=raising(OutOfTime("took too long"))),
        Step(name="large", run=Counted(), least_s=10_000),
        Step(name="last", run=last),
    ]
    assert run(phase("some", *steps), phase("next", Step(name="one", run=Counted()))) == 1
    found = record(tmp_path, "some")
    assert {name: step["outcome"] for name, step in found["steps"].items()} == {
        "first": "measured", "fails": "failed", "crashes": "failed", "not here": "not here", "late": "out of time",
        "large": "out of time", "last": "measured",
    }  # fmt: skip
    assert found["outcome"] == "cut off"
    assert found["steps"]["crashes"]["reason"] == "KeyError: 'missing'"
    assert record(tmp_path, "next")["outcome"] == "done"
    page = (tmp_path / "page.md").read_text()
    assert all(word in page for word in ("it broke", "no such kernel", "Phase next: done"))

    mended = [steps[0], Step(name="fails", run=Counted()), *steps[3:4], steps[6]]
    assert run(phase("some", *mended), phase("next", Step(name="one", run=Counted()))) == 0
    assert (first.times, last.times) == (1, 1), "what is measured is kept"


def test_another_machine_or_version_measures_anew(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Counted()
    assert run(phase("some", Step(name="one", run=step))) == 0
    monkeypatch.setattr("distft.core.environment.versions", lambda: {"torch": "9.9"})
    assert run(phase("some", Step(name="one", run=step))) == 0
    assert step.times == 2
    assert record(tmp_path, "some")["versions"] == {"torch": "9.9"}


def test_what_is_wrong_comes_first_and_ends_with_one(run: Any, tmp_path: Path) -> None:
    assert run(phase("some", Step(name="one", run=Counted()), wrong=("losses <differ>",))) == 1
    assert record(tmp_path, "some")["outcome"] == "done"
    text = (tmp_path / "page.md").read_text()
    assert text.index("some: losses <differ>") < text.index("Phase some")
    assert "losses &lt;differ&gt;" in (tmp_path / "page.html").read_text()


def test_time_goes_to_phases_by_share_and_none_to_those_that_are_not_here(run: Any, tmp_path: Path) -> None:
    left: dict[str, float] = {}

    def timed(name: str) -> Step:
        def taken() -> Measured:
            left[name] = Context.left_s(contexts[name])
            return {}

        return Step(name=name, run=taken)

    contexts: dict[str, Context] = {}

    def of(name: str, **more: Any) -> Phase:
        made = phase(name, timed(name), **more)
        kept = made.steps

        def steps(context: Context) -> Iterator[Step]:
            contexts[name] = context
            yield from kept(context)

        steps.__module__ = __name__
        return Phase(**{**vars(made), "steps": steps})

    began = time.monotonic()
    assert run(of("a"), of("b", share=3.0), of("c", share=96.0, why_not="one GPU"), seconds=1000) == 0
    assert time.monotonic() - began < 100
    assert left["a"] == pytest.approx(250, abs=30)
    assert left["b"] == pytest.approx(1000, abs=60), "what the first did not need"
    assert record(tmp_path, "c")["outcome"] == "not here"


def test_a_suite_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    told = [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failed"}, {"test": "b", "outcome": "passed"}]
    lines.write_text("".join(json.dumps(line) + "\n" for line in told) + '{"test": "c", "outc')
    assert {name: line["outcome"] for name, line in report_lines.read(lines).items()} == {"a": "passed", "b": "passed"}


def test_calibration_takes_uncompiled_cases_and_no_memory_that_was_given_back(tmp_path: Path) -> None:
    def case(calibrates: bool, used: int) -> dict[str, Any]:
        measured = {"world": 1, "step_s": 1.0, "work": {"micros": 1}, "calibrates": calibrates, "allocated_bytes": 5,
                    "reserved_bytes": 6, "used_bytes": used}  # fmt: skip
        return {"measured": measured}

    memory = {"device": "NVIDIA H200", "steps": {"a": case(True, 7), "b": case(False, 7), "c": case(True, 4)}}
    kernels = {"steps": {"kernels": {"measured": {"matmul_flops_per_s": 1.0}}}, "date": "2026-11-28", "commit": "c",
               "device": "NVIDIA H200", "versions": {"torch": "2.13", "triton": None}}  # fmt: skip
    calibration.write(tmp_path, {"memory": memory})
    assert not (tmp_path / "calibration.json").exists()
    calibration.write(tmp_path, {"rates": kernels, "memory": memory})
    said = json.loads((tmp_path / "calibration.json").read_text())
    assert {one["name"]: one["used_bytes"] for one in said["cases"]} == {"a": 7, "c": None}
    assert said["versions"] == {"torch": "2.13"}
    assert said["kernels"]["link_bytes_per_s"] is None


def test_a_gpu_gets_twelve_cases_of_memory_and_every_change() -> None:
    context = Context(out=Path(), gpus=("NVIDIA H200",), ranks=1)
    assert len(list(PHASES["memory"].steps(context))) == 12
    names = [step.name for step in PHASES["goals"].steps(context)]
    assert {
        f"llama8b-lora: {change}" for change in ("compile-off", "chunk-512", "gqa-repeated", "fa3", "lora-unfused")
    } <= set(names)
    assert {f"{goal}: as it is" for goal in ("llama8b-full", "llama8b-qlora", "llama70b-qlora")} <= set(names)
    assert "one GPU" in PHASES["ranks"].why_not(context)
