"""Every optimizer saved and restored, and tests/gpu: failures are recorded and stop nothing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from benchmarks.first_hour import report_lines
from benchmarks.first_hour.phase import Context, Measured, OutOfTime, Phase, Step, StepFailed, Table


def steps(context: Context) -> Iterator[Step]:
    def optimizers() -> Measured:
        return context.worker("optimizers", {})

    def suite() -> Measured:
        """A run that is cut off goes on with the tests that have not passed."""
        lines = context.work / "tests.jsonl"
        lines.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "benchmarks.first_hour.report_lines"]
        late = ""
        try:
            code = context.run(command, "tests.log", **{report_lines.VARIABLE: str(lines)})
        except OutOfTime as error:
            code, late = -1, str(error)
        found = report_lines.read(lines)
        if late and not found:
            raise OutOfTime(late)
        if not found:
            raise StepFailed(f"pytest ended with {code}: {context.last_line('tests.log')}")
        if late:
            raise OutOfTime(f"{_counts(found)} so far; {late}")
        return {"code": code, "tests": found}

    yield Step(name="optimizers", run=optimizers, least_s=5)
    yield Step(name="tests/gpu", run=suite, least_s=5)


def _counts(found: dict[str, Measured]) -> str:
    return ", ".join(
        f"{count} {outcome}" for outcome, count in Counter(one["outcome"] for one in found.values()).items()
    )


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    if "optimizers" in measured:
        rows = [(name, why or "no bit changed") for name, why in measured["optimizers"]["optimizers"].items()]
        yield Table(caption="state made early, saved, restored", heads=("optimizer", "outcome"), rows=rows)
    if "tests/gpu" in measured:
        found = measured["tests/gpu"]["tests"]
        yield f"tests/gpu: {_counts(found)}"
        failed = [(name, _last(one["why"])) for name, one in found.items() if one["outcome"] == "failed"]
        if failed:
            yield Table(caption="failed", heads=("test", "why"), rows=failed)
        skipped = Counter(one["why"] for one in found.values() if one["outcome"] == "skipped")
        if skipped:
            rows = [(str(count), why) for why, count in skipped.items()]
            yield Table(caption="skipped", heads=("tests", "why"), rows=rows)


def _last(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    for name, why in measured.get("optimizers", {}).get("optimizers", {}).items():
        if why:
            yield f"{name}: {why}"
    for name, one in measured.get("tests/gpu", {}).get("tests", {}).items():
        if one["outcome"] == "failed":
            yield f"{name}: {_last(one['why'])}"


PHASE = Phase(name="suite", title="Optimizers and tests/gpu", share=4, steps=steps, show=show, wrong=wrong)
