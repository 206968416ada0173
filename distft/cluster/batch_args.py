"""Parses the batch script's command line as the training processes will: which recipe, which run folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from distft.catalog import REGISTRIES
from distft.cluster.preflight import Floors
from distft.cluster.step import Launcher
from distft.core.command_line import CommandParser, without
from distft.core.errors import RecipeError
from distft.recipe import Recipe, check_world, load_recipe
from distft.recipe.toml_text import toml_value
from distft.train_options import parser


@dataclass(frozen=True, kw_only=True)
class BatchArgs:
    """One command line."""

    recipe: Recipe
    train: tuple[str, ...]
    """Arguments for `distft.train`, the recipe's path first."""
    max_stalled: int
    launcher: Launcher
    chain: bool
    """The queue does not requeue: another job follows this one."""
    after: str | None
    """The job before this one."""
    doctor: bool
    """Examine the nodes first, when there are several."""
    floors: Floors


def read(argv: Sequence[str]) -> BatchArgs:
    """Read `[--launcher srun|torchrun] [--max-stalled-restarts K] [--no-doctor] RECIPE [train options]`.

    Raises:
        RecipeError: the recipe is faulty; said here once, before any process is started.
    """
    made = CommandParser(
        prog="train.sbatch",
        usage="sbatch [options] cluster/train.sbatch [--max-stalled-restarts K] [--no-doctor] RECIPE [train options]",
    )
    made.add_argument("--launcher", choices=("srun", "torchrun"), default="srun")
    made.add_argument("--max-stalled-restarts", type=int, default=3, metavar="K")
    made.add_argument("--chain", action="store_true")
    made.add_argument("--after", metavar="JOB")
    made.add_argument("--no-doctor", action="store_true")
    made.add_argument("--link-floor", type=float, metavar="GB/s")
    made.add_argument("--disk-floor", type=float, metavar="GB/s")
    made.add_argument("train", nargs=argparse.REMAINDER)
    args = made.parse_args(argv)
    if not args.train or args.train[0].startswith("-"):
        made.error("a recipe is needed, and comes before the options of distft.train")
    return BatchArgs(
        recipe=_recipe(args.train),
        train=tuple(args.train),
        max_stalled=args.max_stalled_restarts,
        launcher=args.launcher,
        chain=args.chain,
        after=args.after,
        doctor=not args.no_doctor,
        floors=Floors(link=args.link_floor, disk=args.disk_floor),
    )


def _recipe(train: Sequence[str]) -> Recipe:
    """Return the recipe that `distft train` would read from these arguments; a mistyped flag ends the process here."""
    options = parser().parse_args(train)
    if options.nproc is not None:
        parser().error("--nproc is for one machine; Slurm starts the processes of this job")
    folder = [] if options.output_dir is None else [f"output_dir={toml_value(str(options.output_dir))}"]
    return load_recipe(options.recipe, registries=REGISTRIES, overrides=[*options.overrides, *folder])


def without_resume(train: Sequence[str]) -> tuple[str, ...]:
    """Return the same arguments without --resume: the run then goes on from its own newest checkpoint."""
    return tuple(without(train, "--resume"))


def nodes_that_divide(recipe: Recipe, num_nodes: int, per_node: int) -> int:
    """Return the most nodes, of those there are, over whose processes the global batch splits evenly.

    Raises:
        RecipeError: not even one node's processes do; lists the numbers that would.
    """
    for count in range(num_nodes, 0, -1):
        try:
            check_world(recipe, count * per_node)
        except RecipeError:
            if count == 1:
                raise
        else:
            return count
    raise AssertionError("a job has at least one node")
