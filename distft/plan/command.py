"""`python -m distft.plan RECIPE`: memory, fit, changes and speed, before anything is queued."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.core.command_line import (
    CommandParser,
    add_config,
    add_json,
    add_machine,
    add_overrides,
    add_price,
)
from distft.core.errors import DONE, DistftError, Problem, RecipeError
from distft.core.log import quiet_libraries

LIMITS = ("seq", "micro", "model")


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft plan",
        description="Does it fit, what to change, how fast: from the recipe and the model's config alone.",
    )
    made.add_argument("recipe", metavar="RECIPE", nargs="?", help="a TOML recipe")
    add_machine(made)
    made.add_argument("--methods", default="", metavar="full,lora,qlora", help="compare these instead of the recipe's")
    made.add_argument("--engines", default="", metavar="NAME,NAME,…", help="compare these instead of the recipe's")
    made.add_argument("--max", choices=LIMITS, help="the longest sequence, largest micro-batch or model that fits")
    add_price(made)
    made.add_argument(
        "--row-tokens", type=int, metavar="N", help="tokens of a row on average, for models that take rows one by one"
    )
    add_config(made)
    made.add_argument(
        "--calibrate",
        metavar="FILE",
        help="first take this GPU's rates from what make gpu-first measured, and keep them",
    )
    made.add_argument(
        "--calibration", metavar="FILE", help="where calibrations are kept (DISTFT_CALIBRATION, else the cache folder)"
    )
    made.add_argument("--explain", action="store_true", help="the formula behind every figure, with its numbers")
    add_json(made)
    add_overrides(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any. Not fitting is an answer, not an error."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    from distft.catalog import PLUGINS, REGISTRIES
    from distft.plan import calibration
    from distft.plan.machine import check_names, read_machine
    from distft.recipe import check_world, load_recipe

    # Mistakes of the user are told before anything heavy is imported.
    calibrations = calibration.place(options.calibration)
    if options.calibrate is not None:
        calibrated = calibration.read(Path(options.calibrate), gpu=options.gpu)
        calibration.keep(calibrated, calibrations)
        print("\n".join(calibrated.lines()), file=sys.stderr)
        print(f"kept: {calibrations}", file=sys.stderr)
        if options.recipe is None:
            return DONE
        options.gpu = calibrated.gpu.name
    elif options.recipe is None:
        raise RecipeError("distft plan", [Problem(message="RECIPE  is missing", fix="or --calibrate FILE")])
    machine = read_machine(options.gpu, options.gpus, options.nodes, calibrations)
    PLUGINS.load()
    methods, engines = _names(options.methods), _names(options.engines)
    check_names("--methods", methods, list(REGISTRIES.method))
    check_names("--engines", engines, list(REGISTRIES.engine))
    recipe = load_recipe(options.recipe, registries=REGISTRIES, overrides=options.overrides)
    if options.max != "micro":  # which sets a global batch of its own
        micro = recipe.train.micro_batch_size
        check_world(recipe, machine.world, 1 if micro == "auto" else micro)
    quiet_libraries()
    from distft import compatibility
    from distft.plan import show
    from distft.plan.planner import Planner
    from distft.plan.source import config_folder

    with config_folder(recipe, options.config) as folder:
        compatibility.refuse_misfits(recipe, folder)
        planner = Planner(
            path=options.recipe,
            overrides=options.overrides,
            folder=folder,
            machine=machine,
            document_tokens=_row_tokens(options.row_tokens, recipe),
        )
        cases, refused = planner.cases(methods, engines)
        changes = {} if options.max else {id(case): planner.changes(case) for case in cases if not case.fits}
        limits = [planner.limit(options.max, case) for case in cases] if options.max else []
    if options.json:
        print(json.dumps(_json(recipe.name, cases, refused, changes, limits), indent=1))
        return DONE
    lines: list[str] = []
    if len(cases) != 1:
        lines += [*show.table(cases, refused), ""]
    for case in cases:
        if len(cases) == 1:
            lines += [*show.details(case, price=options.price, explain=options.explain), ""]
        elif options.explain or id(case) in changes:
            lines += [f"{case.setup.recipe.method.name} x {case.setup.engine}:"] if not options.explain else []
            lines += [*show.details(case, price=options.price, explain=True), ""] if options.explain else []
        if id(case) in changes:
            lines += [*show.advice(changes[id(case)]), ""]
    lines += [show.limit(limit, case) for limit, case in zip(limits, cases, strict=False)]
    print("\n".join(lines).rstrip())
    return DONE


def _row_tokens(row_tokens: int | None, recipe: Any) -> int | None:
    from distft.core.errors import Problem, RecipeError

    longest = recipe.data.max_length
    if row_tokens is not None and not 1 <= row_tokens <= longest:
        problem = Problem(message=f"--row-tokens {row_tokens}  must be from 1 to [data] max_length = {longest}")
        raise RecipeError("distft plan", [problem])
    return row_tokens


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _json(name: str, cases: Any, refused: Any, changes: Any, limits: Any) -> dict[str, Any]:
    listed = []
    for number, case in enumerate(cases):
        row = case.to_json()
        row["changes"] = [
            {
                "what": change.what,
                "set": list(change.overrides),
                "gpus": change.machine.world,
                "peak_bytes": change.case.memory.peak,
                "slower": change.cost,
            }
            for change in changes.get(id(case), ())
        ]
        if limits:
            row["max"] = {"what": limits[number].what, "value": limits[number].value}
        listed.append(row)
    return {"recipe": name, "cases": listed, "refused": [vars(refusal) for refusal in refused]}
