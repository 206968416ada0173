"""`distft reproduce RUN`: hashes first, then the run once more, then the two held against each other.

A folder of `distft merge` or `distft export` is made again from its source, and its files compared by their hashes.

Exit code 0: equal bit for bit, or, on another layout, within 1e-5. 1: it ran and is not. 3 and 4: other rows, other
weights; nothing was run. 75: stopped by a signal. Else the code that the second run ended with.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.core import supervise
from distft.core.command_line import CommandParser, add_json, at_least_one
from distft.core.errors import DONE, PREEMPTED_AND_SAVED, DistftError, FileSystemError, MachineError, Preempted
from distft.run_record import RunRecord, read_run

DIFFERS = 1
LOG = "output.log"
_POLL_S = 0.2
_EXITS = {"data": 3, "model": 4}


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft reproduce",
        description="Run a run, or make a merged or exported folder, again, and say whether it comes out the same.",
    )
    made.add_argument("run", metavar="RUN", type=Path, help="a run folder, or one of distft merge or export")
    made.add_argument("--output-dir", type=Path, metavar="D", help="folder of the new run folder (RUN.reproduced-N)")
    made.add_argument(
        "--nproc", type=at_least_one, metavar="N", help="processes on this machine (as many as the run had)"
    )
    made.add_argument("--steps", type=int, metavar="K", help="only the first K steps, under the whole run's schedule")
    made.add_argument("--against", type=Path, metavar="RUN", help="compare with this run folder, and start nothing")
    made.add_argument("--only-check", action="store_true", help="compare hashes and versions, and start nothing")
    add_json(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    from distft.reproduce import folders

    if folders.is_made_folder(options.run):
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            result, code = folders.reproduce(options, _quiet if options.json else print)
        return _finish(options, result, code)
    first = read_run(options.run)
    if not first.recipe_text or not first.manifest:
        raise FileSystemError(f"{options.run}: no run folder: recipe.toml and manifest.json say what to run again")
    from distft.catalog import REGISTRIES
    from distft.core.log import quiet_libraries
    from distft.recipe import load_recipe
    from distft.reproduce.inputs import differences

    quiet_libraries()
    recipe = load_recipe(options.run / "recipe.toml", registries=REGISTRIES)
    changes = differences(first.manifest, recipe, _device())
    result: dict[str, Any] = {"run": str(options.run), "differences": [vars(change) for change in changes]}
    say = _quiet if options.json else print
    say(f"{first.name}: rows, weights and versions against manifest.json")
    for change in changes:
        mark = "!" if change.is_fatal else "~" if change.kind == "computes" else " "
        say(f"  {mark} {change}")
    if not changes:
        say("  all as they were")
    fatal = [change for change in changes if change.is_fatal]
    if fatal and options.against is None:
        say("not the same rows or weights: there is nothing to reproduce")
        return _finish(options, result, _EXITS[fatal[0].kind])
    if options.only_check:
        return _finish(options, result, DONE)
    return _held_against(options, first, result, say)


def _held_against(options: argparse.Namespace, first: RunRecord, result: dict[str, Any], say: Any) -> int:
    from distft.reproduce.outcome import compare

    if options.against is not None:
        folder, code = options.against, DONE
    else:
        folder, code = _again(options, first, say)
    second = read_run(folder)
    result |= {"again": str(folder), "exit_code": code}
    if code not in (DONE, PREEMPTED_AND_SAVED if options.steps is not None else DONE):
        say(f"the second run ended with code {code}: {second.exit.get('reason', 'its own message is above')}")
        return _finish(options, result, code)
    outcome = compare(first, second, until=options.steps)
    same = _layout(first) == _layout(second)
    verdict = "equal" if outcome.equal else "within 1e-5" if outcome.within else "differs"
    good = outcome.equal or (outcome.within and not same)
    result |= {"outcome": outcome.to_json(), "same_layout": same, "verdict": verdict, "reproduced": good}
    say(f"{folder}, {_words(second)}" + ("" if same else f", where the first was {_words(first)}"))
    for line in outcome.lines():
        say(f"  {line}")
    if outcome.equal:
        say("reproduced: equal bit for bit")
    elif good:
        say("reproduced: within 1e-5, which is what another layout allows")
    else:
        say(
            "not reproduced"
            + (": within 1e-5, but the same layout should give the same bits" if outcome.within else "")
        )
    return _finish(options, result, DONE if good else DIFFERS)


def _again(options: argparse.Namespace, first: RunRecord, say: Any) -> tuple[Path, int]:
    """Start it, in the folder that the first was started in; (run folder, exit code)."""
    from distft.catalog import REGISTRIES
    from distft.launch import launch_command, launch_env
    from distft.recipe import check_world, load_recipe

    world, nodes = first.world or 1, int(first.manifest.get("nodes") or 1)
    nproc = options.nproc or world
    parent = (options.output_dir or _fresh(options.run)).absolute()
    arguments = [str((options.run / "recipe.toml").absolute()), "--output-dir", str(parent), "--resume", "never"]
    pinned = _pinned(first, nproc)
    for setting in pinned:
        arguments += ["--set", setting]
    check_world(load_recipe(arguments[0], registries=REGISTRIES, overrides=pinned), nproc, 1)
    if nodes > 1 and options.nproc is None:
        raise MachineError(
            f"{options.run} ran on {nodes} nodes, and this command starts processes on one machine only; start there\n"
            f"  python -m distft.train {' '.join(map(repr, arguments))}\n"
            f"then distft reproduce {options.run} --against {parent / first.name}; or give --nproc for another layout"
        )
    folder = parent / first.name
    if (folder / "metrics.jsonl").exists():
        raise FileSystemError(f"{folder}: there is a run already; name another --output-dir, or compare with --against")
    was_in = Path(str(first.manifest.get("cwd", ".")))
    say(f"running it again on {nproc} process{'es' if nproc != 1 else ''}, in {folder}")
    parent.mkdir(parents=True, exist_ok=True)
    # A launcher reports a run that was asked to stop as a failure, at length: not worth the screen.
    with (parent / LOG).open("wb") if options.steps is not None else contextlib.nullcontext(sys.stderr) as output:
        ended = supervise.run(
            launch_command(nproc, arguments),
            env=launch_env(),
            launcher=nproc > 1,
            cwd=was_in if was_in.is_dir() else None,
            output=output,
            meanwhile=None if options.steps is None else _Until(folder, options.steps).look,
        )
    if ended.signals and ended.code:
        raise Preempted(f"stopped by {signal.Signals(ended.signals[0]).name}; {folder} holds what was run again so far")
    return folder, ended.code


class _Until:
    """Asks a run to stop once some steps are made: its schedule stays that of the whole run."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._next, self._stop_requested = 0.0, False

    def look(self) -> None:
        """Check the stop condition; called several times a second."""
        now = time.monotonic()
        if not self._stop_requested and now >= self._next:
            self._next = now + _POLL_S
            if read_run(self._folder).last.get("step", 0) >= self._steps:
                (self._folder / "STOP").touch()
                self._stop_requested = True


def _pinned(first: RunRecord, nproc: int) -> list[str]:
    """Return settings for what the recipe left to `auto` and the first run chose, as far as `nproc` allows."""
    from distft.catalog import REGISTRIES
    from distft.recipe.toml_text import toml_value

    settings = []
    if (date := first.manifest.get("date")) and "date" not in first.table("data"):
        settings.append(f"data.date={toml_value(date)}")  # chat templates may write it
    layout = first.manifest.get("layout") or {}
    if first.table("engine").get("name") == "auto" and not (first.engine == "solo" and nproc > 1):
        fields = REGISTRIES.engine[first.engine].params.model_fields
        kept = {key: value for key, value in first.table("engine").items() if key in fields}
        settings.append(f"engine={toml_value({'name': first.engine, **kept})}")
    train, micro = first.table("train"), layout.get("micro_batch_size")
    if train.get("micro_batch_size") == "auto" and micro and train.get("global_batch_size", 0) % (nproc * micro) == 0:
        settings.append(f"train.micro_batch_size={micro}")  # dropout's mask is drawn for a micro-batch at once
    if nproc == first.world and train.get("activation_checkpointing") == "auto" and layout.get("checkpointing"):
        settings.append(f'train.activation_checkpointing="{layout["checkpointing"]}"')
    return settings


def _layout(run: RunRecord) -> tuple[Any, ...]:
    layout = run.manifest.get("layout") or {}
    return run.engine, run.world, layout.get("micro_batch_size"), run.manifest.get("device")


def _words(run: RunRecord) -> str:
    return f"{run.engine} × {run.world}"


def _fresh(run: Path) -> Path:
    return next(
        path
        for number in itertools.count(1)
        if not (path := run.absolute().with_name(f"{run.absolute().name}.reproduced-{number}")).exists()
    )


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _finish(options: argparse.Namespace, result: dict[str, Any], code: int) -> int:
    if options.json:
        print(json.dumps(result | {"code": code}, default=str))
    return code


def _quiet(line: str) -> None:
    """Print nothing: with --json nothing else is printed."""
