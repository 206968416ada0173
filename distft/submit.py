"""`distft submit RECIPE... --nodes N --gpus-per-node G`: into a Slurm queue, once all that can be checked here was.

Several recipes become one array, a job for each; `--chain N` queues N jobs in a row for one run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.command_line import CommandParser, add_output_dir, add_overrides, add_site
from distft.core.errors import DONE, DistftError, MachineError, Problem, RecipeError

if TYPE_CHECKING:  # nothing heavy before the flags are read: help is instant
    from distft.cluster.script import SlurmRequest
    from distft.cluster.site import Site
    from distft.recipe import Recipe

SUBMIT_S = 60.0


def submit(text: str) -> str:
    """Hand a script to sbatch; the job's id.

    Raises:
        MachineError: there is no Slurm here, or it refuses; carries its words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=SUBMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"sbatch: {error}; submit from a login node, or use --dry-run") from None
    if done.returncode:
        raise MachineError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where several clusters share a controller


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the error's exit code, if any."""
    made = parser()
    args, more = made.parse_known_args(argv)
    if args.chain > 1 and len(args.recipes) > 1:
        made.error("--chain goes with one recipe: submit each by itself")
    from distft.cluster import script
    from distft.cluster.site import Site, read_site
    from distft.run_folder import RunFolder

    try:
        site = Site() if args.site is None else read_site(args.site)
        trains = [_train(args, recipe, more) for recipe in args.recipes]
        recipes = [_checked(args, site, train) for train in trains]
        wanted = _wanted(args, recipes)
        if args.dry_run:
            print(script.render(site, wanted, *trains), end="")
            if args.chain > 1:
                print(f"and {args.chain - 1} more, each --dependency=afterany: the one before it", file=sys.stderr)
            return DONE
        for recipe in recipes:
            RunFolder(recipe.run_dir, writes=True)  # sbatch does not make folders for a job's output
        jobs = [submit(script.render(site, wanted, *trains))]
        while len(jobs) < args.chain:
            jobs.append(submit(script.render(site, replace(wanted, after=jobs[-1]), *trains)))
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    _say(recipes, jobs, wanted.output_dir)
    return DONE


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft submit",
        description="Put a run into a Slurm queue. Flags that are not listed here go to `distft train`.",
    )
    made.add_argument("recipes", metavar="RECIPE", nargs="+", help="a TOML recipe; several become one array")
    made.add_argument("--nodes", default="1", metavar="N", help="a number, or a range such as 2-8 (default 1)")
    made.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="0: one process a node, on CPUs")
    made.add_argument("--time", metavar="D-HH:MM:SS", help="limit of one start; the run goes on in the next")
    made.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs in a row, where jobs do not requeue")
    made.add_argument("--partition", help="instead of the site's")
    add_site(made)
    made.add_argument("--gpu", metavar="NAME|GiB", help="plan for it, instead of the site's")
    made.add_argument("--no-plan", action="store_true", help="submit even what the plan says cannot fit")
    made.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    add_overrides(made)
    add_output_dir(made)
    return made


def _train(args: argparse.Namespace, recipe: str, more: Sequence[str]) -> list[str]:
    """Return the arguments of distft.train."""
    train = [recipe, *(word for change in args.overrides for word in ("--set", change))]
    return [*train, *(["--output-dir", str(args.output_dir)] if args.output_dir is not None else []), *more]


def _checked(args: argparse.Namespace, site: Site, train: Sequence[str]) -> Recipe:
    """Load the recipe, check that it is sound and splits over the processes, and that it fits the memory.

    Raises:
        RecipeError: it is not, or does not.
    """
    from distft.cluster import batch_args
    from distft.cluster.memory_check import refuse_what_cannot_fit
    from distft.recipe import check_world

    recipe = batch_args.read(train).recipe
    if args.nodes.isdecimal():  # of a range, a start uses as many as the global batch allows
        check_world(recipe, int(args.nodes) * max(1, args.gpus_per_node))
    gpu = args.gpu or site.gpu
    if gpu and args.gpus_per_node and not args.no_plan:
        summary = refuse_what_cannot_fit(
            recipe, train[0], args.overrides, gpu=gpu, gpus_per_node=args.gpus_per_node, nodes=args.nodes
        )
        print(f"plan: {summary}", file=sys.stderr)
    return recipe


def _wanted(args: argparse.Namespace, recipes: Sequence[Recipe]) -> SlurmRequest:
    """Build the request to Slurm.

    Raises:
        RecipeError: two recipes of an array are one run.
    """
    from distft.cluster.script import SlurmRequest

    folders = [recipe.run_dir for recipe in recipes]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        same = [recipe.source for recipe in recipes if recipe.run_dir == twice]
        raise RecipeError(" and ".join(same), [Problem(message=f"both write {twice}", fix="give each its own name")])
    alone = len(recipes) == 1
    return SlurmRequest(
        name=recipes[0].name if alone else "distft",
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        partition=args.partition,
        output_dir=folders[0] if alone else folders[0].parent,
        chain=args.chain > 1,
    )


def _say(recipes: Sequence[Recipe], jobs: Sequence[str], folder: Path) -> None:
    from distft.cluster import script

    for job in jobs:
        print(f"job {job}")
    if len(recipes) == 1:
        for job in jobs:
            print(f"output: {folder}/{script.output_name(job)}")
    for number, recipe in enumerate(recipes):
        if len(recipes) > 1:
            print(f"output: {folder}/{script.output_name(f'{jobs[0]}_{number}')}  ({recipe.name})")
    print(f"state:  distft status {folder}")


if __name__ == "__main__":
    sys.exit(main())
