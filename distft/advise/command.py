"""`python -m distft.advise`: asks in a terminal what flags did not say, and writes the recipe where told."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.advise.situation import ADVISED, GOALS, RowsHold, Situation
from distft.core.command_line import CommandParser, add_config, add_json, add_machine
from distft.core.errors import DONE, DistftError, FileSystemError, Problem, RecipeError
from distft.core.nearest import nearest

if TYPE_CHECKING:
    from distft.data.samples import FormatSpec
    from distft.data_quality import DataQualityReport

_SOMEWHERE = "data/train.jsonl"
_FORMATS: dict[RowsHold, str] = {"answers": "messages", "pairs": "preference", "labels": "unpaired"}
"""What rows that nobody has seen yet are taken for."""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft advise",
        description="Prompt, retrieve or fine-tune; which method and settings. Asks what is not said, in a terminal.",
        epilog="goals: " + "; ".join(f"{name}: {what}" for name, what in GOALS.items()),
    )
    made.add_argument("--goal", metavar="GOAL", help=f"what to teach: {', '.join(GOALS)}")
    made.add_argument("--model", metavar="MODEL", help="folder or hub id to start from")
    made.add_argument("--rows", type=int, metavar="N", help="training rows; counted when --data is given")
    made.add_argument("--data", metavar="FILE", help="training rows: counted, measured and looked through")
    made.add_argument("--eval", metavar="FILE", help="rows to evaluate on")
    made.add_argument(
        "--pretrained", action="store_true", help="the model has had no supervised fine-tuning: pairs in one stage"
    )
    made.add_argument("--method", metavar="NAME", help=f"chosen already: {', '.join(ADVISED)}; the rest is for it")
    add_machine(made)
    add_config(made)
    made.add_argument("--name", default="advised", help="of the run (advised)")
    made.add_argument("--write", metavar="FILE", help="write the recipe")
    add_json(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        if sys.stdin.isatty() and not options.json:
            _ask(options)
        return _run(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (EOFError, KeyboardInterrupt):
        print("\nnothing written", file=sys.stderr)
        return RecipeError.exit_code


def _ask(options: argparse.Namespace) -> None:
    """Ask for what the flags leave open."""
    if options.goal is None:
        print("What is the model to learn?")
        for name, what in GOALS.items():
            print(f"  {name:<8} {what}")
        options.goal = input("goal: ").strip()
    if options.model is None:
        options.model = input("model (folder or hub id): ").strip()
    if options.rows is None and options.data is None:
        reply = input("training rows (a number, or a file): ").strip()
        options.rows, options.data = (int(reply), None) if reply.isdecimal() else (None, reply or None)
    if options.gpu is None:
        options.gpu = input("GPU (name such as h100-80gb, or GiB; empty: not known): ").strip() or None
        if options.gpu and options.gpus == 1:
            reply = input("how many (1): ").strip()
            options.gpus = int(reply) if reply.isdecimal() else 1


def _run(options: argparse.Namespace) -> int:
    from distft.catalog import REGISTRIES
    from distft.recipe import parse_recipe

    _check(options)
    with contextlib.ExitStack() as stack:
        machine, folder, parameters = _machine_and_model(options, stack)
        care, spec, longer = _look(options)
        rows_hold = _rows_hold(options.goal, spec)
        _check_rows(options, rows_hold, spec)
        from distft.advise.advice import Names, advise, parameters_in_name, tell

        situation = Situation(
            goal=options.goal,
            rows=care.splits["train"].num_rows if care else options.rows,
            parameters=parameters or parameters_in_name(options.model),
            world=options.gpus * options.nodes,
            longest_chars=_chars(care, "max", prompts=2 if rows_hold == "pairs" else 1),
            typical_chars=_chars(care, "p50", prompts=2 if rows_hold == "pairs" else 1),
            rows_hold=rows_hold,
            pretrained=options.pretrained,
            method=options.method,
            longer=longer,
        )
        names = Names(
            name=options.name,
            model=options.model,
            train=options.data or _SOMEWHERE,
            train_format=spec.name if spec else _FORMATS[rows_hold] if options.goal != "domain" else "text",
            held_out=options.eval,
        )
        advice = advise(situation, names, folder=folder, machine=machine)
    parse_recipe(advice.recipe, source="the advised recipe", registries=REGISTRIES)  # never hand over a broken one
    if options.write:
        _write(Path(options.write), advice.recipe)
    if options.json:
        print(json.dumps(advice.to_json() | {"care": care.to_json() if care else None}, indent=1, ensure_ascii=False))
        return DONE
    tell(advice, print)
    for note in care.notes if care else ():
        print(f"! {note}")
    if machine is not None and folder is None:
        print("not planned: the model's config.json is not on this machine; name it with --config FILE")
    print(f"\nwritten: {options.write}  next: distft check {options.write}" if options.write else f"\n{advice.recipe}")
    return DONE


def _check(options: argparse.Namespace) -> None:
    """Raise RecipeError for every flag that is missing or makes no sense."""
    problems = []
    if options.goal not in GOALS:
        meant = nearest(str(options.goal), list(GOALS))
        hint = f'did you mean "{meant}"?  ' if options.goal and meant else ""
        message = f"--goal {options.goal}  unknown goal" if options.goal else "--goal  is missing"
        problems.append(Problem(message=message, fix=f"{hint}allowed: {', '.join(GOALS)}"))
    if options.method not in (None, *ADVISED):
        meant = nearest(options.method, list(ADVISED))
        hint = f'did you mean "{meant}"?  ' if meant else ""
        message = f"--method {options.method}  no rule is about it"
        problems.append(Problem(message=message, fix=f"{hint}allowed: {', '.join(ADVISED)}"))
    if not options.model:
        problems.append(Problem(message="--model  is missing", fix="a folder or a hub id"))
    if options.rows is not None and options.data is not None:
        problems.append(Problem(message="--rows  has no effect with --data, whose rows are counted"))
    elif options.data is None and (options.rows is None or options.rows < 0):
        problems.append(Problem(message="--rows  is missing" if options.rows is None else "--rows  is negative",
                                fix="how many training rows there are, or --data FILE"))  # fmt: skip
    if options.eval and not options.data:
        problems.append(Problem(message="--eval  needs --data", fix="name both, or neither"))
    if options.gpus < 1 or options.nodes < 1:
        problems.append(Problem(message="--gpus and --nodes  must be at least 1"))
    if problems:
        raise RecipeError("distft advise", problems)


def _machine_and_model(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Any, Path | None, int | None]:
    """Return (machine, folder of config.json, parameters), each None when it is not known."""
    from distft.catalog import REGISTRIES
    from distft.core.log import quiet_libraries
    from distft.plan.machine import read_machine
    from distft.plan.source import config_folder
    from distft.recipe import parse_recipe
    from distft.recipe.toml_text import toml_value

    machine = read_machine(options.gpu, options.gpus, options.nodes) if options.gpu else None
    least = f'name = "x"\n[model]\npath = {toml_value(options.model)}\n[[data.train]]\npath = "x"\n'
    recipe = parse_recipe(least, source="distft advise", registries=REGISTRIES)
    try:
        folder = stack.enter_context(config_folder(recipe, options.config))
    except RecipeError:
        if options.config is not None:
            raise
        return machine, None, None
    quiet_libraries()
    from distft.advise.fit import parameters_of

    return machine, folder, parameters_of(options.model, folder)


def _rows_hold(goal: str, spec: FormatSpec | None) -> RowsHold:
    """Return what each row holds, by its format; by the goal where there are no rows yet."""
    if spec is None:
        return "pairs" if goal in ("preference", "reward") else "answers"
    return "labels" if spec.decisive else "pairs" if spec.group_size > 1 else "answers"


def _check_rows(options: argparse.Namespace, rows_hold: RowsHold, spec: FormatSpec | None) -> None:
    """Raise RecipeError where the goal, or what was said of the model, does not fit the rows."""
    problems = []
    where = f"{options.data} has rows of format {spec.name}" if spec else "there are no pairs"
    if options.goal == "reward" and rows_hold != "pairs":
        problems.append(Problem(message=f"--goal reward  needs pairs, and {where}",
                                fix="rows with a prompt, a chosen and a rejected answer"))  # fmt: skip
    if options.goal == "preference" and rows_hold == "answers":
        problems.append(Problem(message=f"--goal preference  needs rows that judge answers, and {where}",
                                fix="pairs, or answers with a label; or --goal style or task to learn the answers "
                                    "themselves"))  # fmt: skip
    if options.pretrained and (rows_hold != "pairs" or options.goal == "reward"):
        why = "with --goal reward" if options.goal == "reward" else f"here: {where}"
        problems.append(Problem(message=f"--pretrained  has no effect {why}", fix="leave it out"))
    if problems:
        raise RecipeError("distft advise", problems)


def _look(options: argparse.Namespace) -> tuple[DataQualityReport | None, FormatSpec | None, float | None]:
    """Return the examined rows, their format and the share of pairs whose chosen answer is longer; or Nones."""
    if options.data is None:
        return None, None, None
    from distft.advise.pairs import share_longer
    from distft.data.prepared_folder import cache_folder
    from distft.data.sources import decide_format, find
    from distft.data_quality import examine
    from distft.demo import locate_path
    from distft.recipe import DataTable

    named = {split: path for split, path in (("train", options.data), ("eval", options.eval)) if path is not None}
    table = DataTable.model_validate_json(
        json.dumps({split: [{"path": locate_path(path)}] for split, path in named.items()})
    )
    report = examine(table, cache_dir=cache_folder(table))
    source = find(table.train[0])
    spec = decide_format(source)
    return report, spec, share_longer(source, spec)


def _chars(care: DataQualityReport | None, percentile: str, *, prompts: int) -> int | None:
    """Return the characters of a row's answers and of its prompt, before each; None when the rows were not examined."""
    if care is None or not care.splits["train"].num_rows:
        return None
    rows = care.splits["train"]
    return prompts * rows.prompt_chars[percentile] + rows.answer_chars[percentile]


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise FileSystemError(f"{path}: exists already; name another file")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileSystemError(f"{path}: cannot be written: {error.strerror}") from None
