"""`python -m distft.bench RECIPE`: measures methods, engines, micro-batches and lengths, each in fresh processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.command_line import CommandParser, add_json, add_overrides
from distft.core.errors import DONE, BusyError, DistftError, Problem, RecipeError

if TYPE_CHECKING:
    from distft.bench.cases import BenchGrid
    from distft.recipe import Recipe

AXES = {"micro": "micro-batch", "length": "length"}
INTERRUPTED = 130


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft bench",
        description="Measure throughput and peak memory of a recipe's methods, engines and sizes, beside the plan of "
        "each. A bench that was stopped goes on where it was: finished cases are kept in DIR/cases.",
    )
    made.add_argument("recipe", metavar="RECIPE", help="a TOML recipe")
    made.add_argument("--methods", default="", metavar="full,lora,qlora", help="instead of the recipe's")
    made.add_argument("--engines", default="", metavar="solo,zero3,…", help="instead of the recipe's; solo: 1 process")
    made.add_argument("--micro", default="", metavar="1,2,4", help="micro-batch sizes instead of the recipe's")
    made.add_argument("--lengths", default="", metavar="512,1024", help="max_length instead of the recipe's")
    made.add_argument("--nproc", type=int, metavar="N", help="processes of a case; default: one per GPU, on a CPU 1")
    made.add_argument("--steps", type=int, default=30, metavar="N", help="steps to measure (30; fewer say little)")
    made.add_argument("--warmup", type=int, default=10, metavar="N", help="steps to discard before (10)")
    made.add_argument(
        "--rows", choices=("real", "full"), default="real",
        help="real: the recipe's rows, what a run will see (default); full: mock rows of full length, the ceiling",
    )  # fmt: skip
    made.add_argument(
        "--profile", action="store_true", help="one more step under torch's profiler: its kernels, kept in the records"
    )
    made.add_argument("--oom", choices=tuple(AXES), help="find the largest micro-batch or length instead, by bisection")
    made.add_argument(
        "--limit-gib", type=float, metavar="GIB",
        help="on a CPU: private memory that each process may have (RLIMIT_DATA); a GPU's own memory is its limit",
    )  # fmt: skip
    made.add_argument("--timeout-s", type=float, default=3600.0, metavar="S", help="for one case (3600)")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: OUTPUT_DIR/NAME-bench of the recipe")
    add_json(made)
    add_overrides(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. A case that runs out of memory or cannot be is a result; one that fails otherwise is code 1."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    from distft.bench import provenance
    from distft.catalog import REGISTRIES
    from distft.recipe import load_recipe

    # Mistakes of the user are told before anything heavy is imported.
    problems = list(_mistakes(options, provenance.gpus()))
    if problems:
        raise RecipeError("distft bench", problems)
    recipe = load_recipe(options.recipe, registries=REGISTRIES, overrides=options.overrides)
    from distft import compatibility
    from distft.bench import cases
    from distft.core.log import quiet_libraries

    quiet_libraries()
    compatibility.refuse_misfits(recipe)
    wanted = cases.BenchGrid(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        methods=tuple(_words(options.methods)),
        engines=tuple(_words(options.engines)),
        micros=tuple(map(int, _words(options.micro))),
        lengths=tuple(map(int, _words(options.lengths))),
        profile=options.profile,
        nproc=options.nproc or max(1, len(provenance.gpus())),
        steps=options.steps,
        warmup=options.warmup,
        rows=options.rows,
        limit_gib=options.limit_gib,
    )
    folder = options.output or recipe.run_dir.with_name(f"{recipe.name}-bench")
    with _alone(folder):
        return _measured(options, wanted, recipe, folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder: two benches in it would run the same cases, and each measure the other.

    Raises:
        BusyError: there is another.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise BusyError(f"{folder}: another bench is measuring here; wait for it, or give another --output") from None


def _measured(options: argparse.Namespace, wanted: BenchGrid, recipe: Recipe, folder: Path) -> int:
    from distft.bench import case_launcher, cases
    from distft.bench.runner import Runner

    runner = Runner(
        folder, lambda case, case_folder: case_launcher.run_case(case, case_folder, timeout_s=options.timeout_s), _say
    )
    name = f"Bench of {recipe.name}"
    if options.oom:
        from distft.bench.boundary import search

        boundary, tried = search(runner, wanted, recipe, options.oom, _say)
        return _show(folder, name, tried, boundary, options)
    listed = cases.grid(wanted)
    return _show(folder, name, list(zip(listed, runner.all(listed), strict=True)), None, options)


def _show(folder: Path, name: str, pairs: Sequence[Any], boundary: Any, options: argparse.Namespace) -> int:
    from distft.bench import plots, table
    from distft.bench.loss_agreement import judge
    from distft.bench.planned import Planning
    from distft.core.files import replace_file, replace_json

    planning = Planning()
    records = judge([planning.beside(case, record) for case, record in pairs])
    whole = {"schema": records[0]["schema"], "name": name, "records": records, "boundary": boundary}
    text = table.markdown(name, records, boundary)
    stem = folder / ("boundary" if options.oom else "bench")
    replace_json(stem.with_suffix(".json"), whole, indent=1)
    replace_file(stem.with_suffix(".md"), text)
    print(json.dumps(whole) if options.json else text)
    if options.oom:
        pass
    elif plots.available():
        for path in plots.draw(records, folder):
            _say(f"plot: {path}")
    else:
        _say(plots.HOW)
    _say(f"{stem.with_suffix('.json')}, {stem.with_suffix('.md')}")
    failed = any(record["outcome"] == "failed" for record in records)
    void = any(not record.get("loss_check", {"equal": True})["equal"] for record in records)
    return 1 if failed or void else DONE


def _mistakes(options: argparse.Namespace, gpus: list[str]) -> Any:
    from distft.catalog import PLUGINS, REGISTRIES
    from distft.recipe.explain import did_you_mean

    PLUGINS.load()
    for flag, given, allowed_names in (
        ("--methods", options.methods, list(REGISTRIES.method)),
        ("--engines", options.engines, list(REGISTRIES.engine)),
    ):
        for word in _words(given):
            if word not in allowed_names:
                allowed = f"allowed: {', '.join(allowed_names)}"
                yield Problem(message=f"{flag} {word}  unknown{did_you_mean(word, allowed_names)}", fix=allowed)
    for flag, given in (("--micro", options.micro), ("--lengths", options.lengths)):
        for word in _words(given):
            if not word.isdecimal() or int(word) < 1:
                yield Problem(message=f"{flag} {word}  must be whole numbers of at least 1, separated by commas")
    for flag, number, least in (
        ("--nproc", options.nproc, 1),
        ("--steps", options.steps, 1),
        ("--warmup", options.warmup, 1),
    ):
        if number is not None and number < least:
            yield Problem(message=f"{flag} {number}  must be at least {least}")
    if options.limit_gib is not None and options.limit_gib <= 0:
        yield Problem(message=f"--limit-gib {options.limit_gib:g}  must be more than 0")
    if options.limit_gib is not None and gpus:
        yield Problem(
            message="--limit-gib  limits the host memory of a run on CPUs, and this machine has a GPU",
            fix="leave it out: the GPU's own memory is the limit; or hide the GPUs with CUDA_VISIBLE_DEVICES=",
        )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)
