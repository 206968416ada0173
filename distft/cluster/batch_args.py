"""Parses the batch script's command line as the training processes will: which recipe, which run folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from distft.catalog import REGISTRIES
from distft.cluster.preflight import Floors
from distft.cluster.step import Launcher
from distft.core.errors import RecipeError
from distft.recipe import Recipe, check_world, load_recipe
from distft.recipe.toml_text import toml_value


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
    """`[--launcher srun|torchrun] [--max-stalled-restarts K] [--no-doctor] RECIPE [train options]`.

    Raises:
        RecipeError: the recipe is faulty; said here once, before any process is started.
    """
    parser = argparse.ArgumentParser(
        prog="train.sbatch",
        usage="sbatch [options] cluster/train.sbatch [--max-stalled-restarts K] [--no-doctor] RECIPE [train options]",
        allow_abbrev=False,
    )
    parser.add_argument("--launcher", choices=("srun", "torchrun"), default="srun")
    parser.add_argument("--max-stalled-restarts", type=int, default=3, metavar="K")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--after", metavar="JOB")
    parser.add_argument("--no-doctor", action="store_true")
    parser.add_argument("--link-floor", type=float, metavar="GB/s")
    parser.add_argument("--disk-floor", type=float, metavar="GB/s")
    parser.add_argument("train", nargs=argparse.REMAINDER)
    own = parser.parse_args(argv)
    if not own.train or own.train[0].startswith("-"):
        parser.error("a recipe is needed, and comes before the options of distft.train")
    path, *options = own.train
    return BatchArgs(
        recipe=load_recipe(path, registries=REGISTRIES, overrides=_overrides(options)),
        train=tuple(own.train),
        max_stalled=own.max_stalled_restarts,
        launcher=own.launcher,
        chain=own.chain,
        after=own.after,
        doctor=not own.no_doctor,
        floors=Floors(link=own.link_floor, disk=own.disk_floor),
    )


def _overrides(options: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output-dir")
    known, _ = parser.parse_known_args(options)  # the others do not change which run this is
    folder = [] if known.output_dir is None else [f"output_dir={toml_value(known.output_dir)}"]
    return [*known.set, *folder]


def without_resume(train: Sequence[str]) -> tuple[str, ...]:
    """The same arguments without --resume: the run then goes on from its own newest checkpoint."""
    kept, is_value = [], False
    for argument in train:
        if not (is_value or argument == "--resume" or argument.startswith("--resume=")):
            kept.append(argument)
        is_value = argument == "--resume"
    return tuple(kept)


def nodes_that_divide(recipe: Recipe, num_nodes: int, per_node: int) -> int:
    """The most nodes, of those there are, over whose processes the global batch splits evenly.

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
