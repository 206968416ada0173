"""`python -m distft.service.preview FOLDER`: what a draft's rows hold and what its job would be, for people to look at.

It is the examination of a job, told in more detail, and a process of its own for the same reasons. What it has found so
far is in the folder's `preview.json`, so that a page shows the rows while the plan is still made.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.advise.situation import ADVISED, Goal, RowsHold, Situation
from distft.core.errors import DistftError, RecipeError
from distft.core.files import replace_json
from distft.core.log import quiet_libraries
from distft.service.edited_recipe import shown
from distft.service.examine import CheckedJob, check_job, code_of, param_of, plain, plan_job
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase

if TYPE_CHECKING:
    from distft.check import SplitView
    from distft.plan.case import PlanCase

PREVIEW = "preview.json"
SAMPLES = 3
"""Rows of each file that are shown."""
_LONGEST = 6000
"""Characters of a row that are shown."""
_HOLD: dict[str, tuple[RowsHold, Goal]] = {
    "supervised": ("answers", "task"),
    "dpo": ("pairs", "preference"),
    "reinforcement": ("prompts", "task"),
}
"""Method of a job -> what its rows hold, and the goal that is taken where none was said."""


def main(argv: list[str]) -> int:
    """Look at one draft, and write what was found as it is found."""
    folder = JobFolder(path=Path(argv[0]))
    quiet_libraries()
    found: dict[str, Any] = {"done": False}
    try:
        for part in preview(folder):
            found |= part
            replace_json(folder.path / PREVIEW, found)
    except DistftError as error:
        found["error"] = {"code": code_of(error), "message": plain(str(error), folder), "param": param_of(error)}
        if isinstance(error, RecipeError):
            found["error"]["problems"] = [
                {"line": problem.line, "message": plain(problem.message, folder), "fix": plain(problem.fix, folder)}
                for problem in error.problems
            ]
        if folder.recipe.exists():
            found.setdefault("recipe", shown(folder.recipe.read_text(encoding="utf-8"), folder))
    replace_json(folder.path / PREVIEW, found | {"done": True})
    return 0


def preview(folder: JobFolder) -> Iterator[dict[str, Any]]:
    """Yield the rows, the recipe and the advice, then the plan.

    Raises:
        DistftError: the draft's job could not be trained.
    """
    from distft.data_quality import summary

    checked = check_job(folder, samples=SAMPLES)
    report = checked.report
    yield {
        "splits": [_split(split, folder) for split in report.splits],
        "care": [plain(line, folder) for line in summary(report.care) if not line.startswith("!")],
        "notes": [plain(note, folder) for note in report.care.notes],
        "num_steps": report.num_steps,
        "parameters": report.parameters,
        "values": checked.values,
        "changed": checked.changed,
        "recipe": shown(folder.recipe.read_text(encoding="utf-8"), folder),
        "advice": _advice(folder, checked),
    }
    planned = plan_job(folder)
    base = ServedBase.model_validate_json(folder.request()["base"])
    yield {
        "plan": {
            "lines": [plain(line, folder) for line in planned.lines],
            "fits": planned.fits,
            "case": None if planned.case is None else _case(planned.case, report.num_steps, base.price),
        }
    }


def _split(split: SplitView, folder: JobFolder) -> dict[str, Any]:
    return {
        "split": split.split,
        "rows": split.num_rows,
        "tokens": split.num_tokens,
        "trained": split.num_supervised,
        "cut": sum(source.num_truncated for source in split.sources),
        "dropped": sum(source.num_dropped for source in split.sources),
        "messages": [plain(line, folder) for source in split.sources for line in (*source.messages(), *source.faults)],
        "samples": [
            {
                "id": plain(sample.id, folder),
                "tokens": sample.num_tokens,
                "trained": sample.num_supervised,
                "pieces": _cut(sample.pieces),
            }
            for sample in split.samples
        ],
    }


def _cut(pieces: tuple[tuple[str, bool], ...]) -> list[tuple[str, bool]]:
    """Return the pieces up to the limit, the last of them cut."""
    kept: list[tuple[str, bool]] = []
    left = _LONGEST
    for text, trained in pieces:
        if left <= 0:
            break
        kept.append((text if len(text) <= left else text[:left] + " …", trained))
        left -= len(text)
    while kept and not kept[-1][1] and not kept[-1][0].strip():  # what a template writes behind the last message
        kept.pop()
    return kept


def _case(case: PlanCase, num_steps: int, price: float | None) -> dict[str, Any]:
    told, world = case.to_json(), case.setup.machine.world
    hours = case.speed.hours if case.speed.hours is not None else num_steps * case.speed.step_s / 3600
    each = told["per_rank"]
    parts = {
        "weights": each["weights_bytes"] + each["quant_constants_bytes"],
        "gradients": each["gradients_bytes"] + each["master_bytes"],
        "optimizer": each["optimizer_bytes"],
        "activations": each["activations_bytes"] + each["gathered_bytes"],
        "logits": each["logits_bytes"],
    }
    parts["workspace"] = max(0, each["peak_bytes"] - sum(parts.values()))
    return {
        "gpu": told["gpu"],
        "world": world,
        "engine": told["engine"],
        "parts": {name: num_bytes for name, num_bytes in parts.items() if num_bytes},
        "peak_bytes": each["peak_bytes"],
        "gpu_bytes": told["gpu_bytes"],
        "hours": hours,
        "tokens_per_s": told["tokens_per_s_predicted"],
        "price": price,
        "cost": None if price is None else hours * world * price,
    }


def _advice(folder: JobFolder, checked: CheckedJob) -> list[dict[str, str]]:
    """Return what `distft advise` says of such rows and of the method that trains them, with its reasons."""
    from distft.advise.advice import decisions

    request = folder.request()
    rows_hold, goal = _HOLD[request["method"]["type"]]
    rows = checked.report.care.splits["train"]
    prompts = 2 if rows_hold == "pairs" else 1

    def chars(percentile: str) -> int | None:
        return prompts * rows.prompt_chars[percentile] + rows.answer_chars[percentile] if rows.num_rows else None

    situation = Situation(
        goal=request.get("goal") or goal,
        rows=checked.num_rows,
        parameters=checked.report.parameters[1] if checked.report.parameters else None,
        world=math.prod(request["layout"]),
        longest_chars=chars("max"),
        typical_chars=chars("p50"),
        rows_hold=rows_hold,
        method=next((name for name in ADVISED if name == checked.method), None),
    )
    return [
        {
            "what": decision.rule.decides,
            "value": f"{decision.value:g}" if isinstance(decision.value, float) else str(decision.value),
            "says": decision.rule.says,
            "why": decision.rule.why,
            "rule": decision.rule.name,
        }
        for decision in decisions(situation)
        if decision.rule.decides != "methods"
    ]


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
