"""`distft doctor`: versions, device, host, disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from benchmarks.first_hour.phase import Context, Measured, Phase, Step, StepFailed, Table


def steps(context: Context) -> Iterator[Step]:
    def run() -> Measured:
        command = [sys.executable, "-m", "distft.doctor", "--json", "--output-dir", str(context.work)]
        code = context.run([*command, "--gib", "0.02" if context.toy else "1"], "doctor.log")
        text = (context.work / "doctor.log").read_text(encoding="utf-8")
        try:
            said = json.loads(text[text.index("{") :])
        except ValueError:
            raise StepFailed(f"exit code {code}: {context.last_line('doctor.log')}") from None
        return {"code": code, "said": said}

    yield Step(name="doctor", run=run, least_s=5)


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    said = measured["doctor"]
    yield f"exit code {said['code']} ({'ready' if said['code'] == 0 else 'a run would fail here'})"
    rows = [(one["check"], one["verdict"], one["found"], one["fix"]) for one in said["said"]["findings"]]
    yield Table(caption="findings", heads=("check", "verdict", "found", "fix"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    for one in measured["doctor"]["said"]["findings"] if "doctor" in measured else ():
        if one["verdict"] == "fail":
            yield f"{one['check']}: {one['found']}"


PHASE = Phase(name="doctor", title="The machine", share=1, steps=steps, show=show, wrong=wrong)
