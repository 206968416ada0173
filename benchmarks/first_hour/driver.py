"""`make gpu-first [MINUTES=25] [OUT=runs/first-hour]`: what only a GPU can tell, phase by phase, kept as it is found.

    python -m benchmarks.first_hour [--minutes 25] [--out FOLDER] [--only PHASE] [--list]

Nothing is downloaded: models are random weights of configs written in `inputs.py`. Without a GPU the same phases run
at toy size, with two processes over gloo where several are needed. FOLDER has one JSON file per phase, `page.md` and
`page.html` with all of them, and `calibration.json` for `distft plan --calibrate`; all are written anew after every
step. The same command goes on where it was: steps that are done are not done again unless the code, the versions or
the machine have changed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.first_hour import ROOT, calibration, page
from benchmarks.first_hour.phase import Context, NotHere, OutOfTime, Phase, Step, StepFailed
from benchmarks.first_hour.phases import PHASES

SCHEMA = 1
INTERRUPTED = 130
FINAL = ("measured", "not here")
"""Outcomes of a step that another run would repeat."""


def main(argv: list[str]) -> int:
    """Returns 0 when every phase is done, 1 when something is wrong or ran out of time, 130 if stopped."""
    from distft.bench.provenance import gpus

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=25.0, help="for all phases together")
    options.add_argument("--out", type=Path, default=Path("runs/first-hour"))
    options.add_argument("--only", action="append", choices=PHASES, help="these phases; repeat")
    options.add_argument("--ranks", type=int, help="processes of the phases with several: all GPUs, or 2 on a CPU")
    options.add_argument("--list", action="store_true", help="name the phases and end")
    asked = options.parse_args(argv)
    if asked.list:
        print("\n".join(f"{phase.name:<10} {phase.title}" for phase in PHASES.values()))
        return 0
    found = tuple(gpus())
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = Context(out=asked.out.resolve(), gpus=found, ranks=asked.ranks or (len(found) if found else 2))
    context.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "-m", "benchmarks.first_hour", *argv])
    return Hour(context, [PHASES[name] for name in asked.only or PHASES], 60 * asked.minutes, command).run()


class Hour:
    """All phases of one command."""

    def __init__(self, context: Context, phases: list[Phase], seconds: float, command: str) -> None:
        self._context, self._phases, self._command = context, phases, command
        self._ends = time.monotonic() + seconds

    def run(self) -> int:
        records: dict[str, dict[str, Any]] = {}
        try:
            for number, phase in enumerate(self._phases):
                to_come = [one for one in self._phases[number:] if not one.why_not(self._context)]
                shares = sum(one.share for one in to_come) or phase.share
                left = max(0.0, self._ends - time.monotonic())
                self._context.deadline = time.monotonic() + left * phase.share / shares
                records[phase.name] = Keeping(self._context, phase, self._command, self._write).run()
        except KeyboardInterrupt:
            print("stopped; the same command goes on where it was", file=sys.stderr)
            return INTERRUPTED
        finally:
            self._write()
        for name, record in records.items():
            for line in record["wrong"]:
                _say(f"WRONG: {name}: {line}")
        _say(f"{self._context.out / 'page.md'}")
        good = all(record["outcome"] in page.GOOD and not record["wrong"] for record in records.values())
        return 0 if good else 1

    def _write(self) -> None:
        """The page and the calibration, from the files of all phases that there are."""
        kept = read_all(self._context.out)
        page.write(self._context.out, PHASES, kept)
        calibration.write(self._context.out, kept)


class Keeping:
    """One phase: its steps, each kept."""

    def __init__(self, context: Context, phase: Phase, command: str, after_step: Any) -> None:
        self._context, self._phase, self._after_step = context, phase, after_step
        self._path = path_of(context.out, phase.name)
        key = key_of(context, phase)
        context.work = context.out / "work" / key_of(context, None)
        before = read(self._path)
        kept = before["steps"] if before.get("key") == key else {}
        self.record: dict[str, Any] = about() | {
            "schema": SCHEMA, "phase": phase.name, "key": key, "device": context.device, "gpus": list(context.gpus),
            "ranks": context.ranks, "command": command, "outcome": "begun", "reason": "",
            "steps": {name: step for name, step in kept.items() if step["outcome"] in FINAL},
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Every step that is still to do, within the phase's time."""
        why_not = self._phase.why_not(self._context)
        if why_not:
            return self._end("not here", why_not)
        steps = list(self._phase.steps(self._context))
        kept = sum(step.name in self.record["steps"] for step in steps)
        _say(f"{self._phase.name}: {self._phase.title}; {len(steps)} steps" + (f", {kept} kept" if kept else ""))
        self._write()
        for step in steps:
            if step.name not in self.record["steps"]:
                self.record["steps"][step.name] = self._take(step)
                self._write()
                self._after_step()
        outcomes = [self.record["steps"][step.name]["outcome"] for step in steps]
        late = outcomes.count("out of time")
        failed = outcomes.count("failed")
        if late:
            return self._end("cut off", f"{late} of {len(steps)} steps were not done in the phase's time")
        return self._end("failed", f"{failed} of {len(steps)} steps failed") if failed else self._end("done", "")

    def _take(self, step: Step) -> dict[str, Any]:
        began, left = time.monotonic(), self._context.left_s()
        measured: dict[str, Any] | None = None
        if left < max(step.least_s, 1.0):
            outcome, reason = "out of time", f"{max(left, 0):.0f} s were left, it takes {step.least_s:.0f}"
        else:
            try:
                outcome, reason, measured = "measured", "", step.run()
            except NotHere as error:
                outcome, reason = "not here", str(error)
            except OutOfTime as error:
                outcome, reason = "out of time", str(error)
            except StepFailed as error:
                outcome, reason = "failed", str(error)
            except Exception as error:  # the other steps are worth having
                outcome, reason = "failed", f"{type(error).__name__}: {error}"
        wall = time.monotonic() - began
        _say(f"  {step.name}: {outcome}{': ' + reason if reason else ''} ({wall:.1f} s)")
        return {"outcome": outcome, "reason": reason, "date": now(), "wall_s": round(wall, 2), "measured": measured}

    def _end(self, outcome: str, reason: str) -> dict[str, Any]:
        self.record |= {"outcome": outcome, "reason": reason}
        self._write()
        self._after_step()
        return self.record

    def _write(self) -> None:
        from distft.core.files import replace_json

        steps = self.record["steps"]
        self.record["wall_s"] = round(sum(step["wall_s"] for step in steps.values()), 2)
        found = {name: step["measured"] for name, step in steps.items() if step["measured"] is not None}
        self.record["wrong"] = list(self._phase.wrong(found))
        replace_json(self._path, self.record, indent=1)


# -- files -----------------------------------------------------------------------------------------------------------


def path_of(out: Path, name: str) -> Path:
    return out / f"{list(PHASES).index(name) + 1:02d}-{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A phase's record; empty when there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("schema") == SCHEMA else {}


def read_all(out: Path) -> dict[str, dict[str, Any]]:
    """The records that there are, by phase."""
    return {name: record for name in PHASES if (record := read(path_of(out, name)))}


def key_of(context: Context, phase: Phase | None) -> str:
    """Names all that a phase's figures depend on: machine, versions, the code under test, this code.

    None: what all phases have in common, for the files they share.
    """
    from distft.bench.provenance import code, hardware
    from distft.core.environment import versions

    files = [*Path(__file__).parent.glob("*.py"), *(ROOT / "tests/gpu").glob("*.py")]
    if phase is not None:
        files.append(Path(sys.modules[phase.steps.__module__].__file__ or ""))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    where = [phase and phase.name, hardware(), versions(), code()["source_sha256"], context.ranks, digest.hexdigest()]
    return hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:12]


def about() -> dict[str, Any]:
    """Date, commit, versions, hardware."""
    from distft.bench.provenance import code, hardware
    from distft.core.environment import versions

    built = code()
    commit = f"{built['commit'] or 'no commit'}{'+changes' if built['dirty'] else ''}"
    return {"date": now(), "commit": commit, "versions": versions(), "hardware": hardware()}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(f"first hour: {line}", file=sys.stderr, flush=True)
