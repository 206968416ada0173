"""The flags of `distft adapters`, apart from its code: help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.core.command_line import CommandParser, add_json, at_least_one
from distft.merge_options import DTYPES

HOWS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "della", "slerp")
"""The names of `distft.merging.hows.HOWS`, a room that this module does not know; a test holds both equal."""
ACTIONS = ("combine", "inspect", "diff", "extract", "resize", "convert")
SETTINGS = ("density", "seed", "epsilon", "normalize", "scale", "t")
"""Flags of `combine` that belong to some ways of combining; each way refuses those of others."""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft adapters",
        description="Adapters as changes of weights: combine A B ... | inspect A | diff A B | extract MODEL | "
        "resize A | convert A. Each A is a run, an adapter folder or a hub id; combine also takes models that were "
        "trained whole.",
        epilog="combine: --how, --weights, --rank, --whole and the settings of the way; extract: --base, --rank; "
        "resize: --rank; convert: --scale plain|rslora. What has no effect is refused.",
    )
    made.add_argument("action", choices=ACTIONS, metavar="|".join(ACTIONS), help="what to do")
    made.add_argument("sources", nargs="+", metavar="A", help="runs, folders or hub ids")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder that appears, whole or not at all")
    made.add_argument("--base", metavar="MODEL", help="folder or hub id of the base, when it is another than is named")
    made.add_argument("--rank", type=at_least_one, metavar="R", help="rank of the result")
    made.add_argument("--how", choices=HOWS, metavar="HOW", help=f"way of combining: {', '.join(HOWS)}")
    made.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each A (1); a negative one takes A away"
    )
    made.add_argument("--density", type=float, metavar="SHARE", help="share of each change that is kept")
    made.add_argument("--seed", type=int, metavar="N", help="of random choices (0)")
    made.add_argument("--epsilon", type=float, metavar="E", help="della: how much more often small entries go (0.1)")
    made.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="ties, dare_ties, della: divide by the weights that agree",
    )  # fmt: skip
    made.add_argument(
        "--scale", metavar="FACTOR|plain|rslora", help="ties: factor of the result; convert: plain or rslora"
    )
    made.add_argument("--t", type=float, metavar="T", help="slerp: place between the first (0) and the second (1)")
    made.add_argument("--whole", action="store_true", help="combine: write a whole model instead of an adapter")
    made.add_argument("--dtype", choices=DTYPES, help="of a whole model (the base's)")
    add_json(made)
    return made
