"""The flags of `distft router`; nothing heavy is imported, so help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.core.command_line import CommandParser, add_json


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft router",
        description="Train a small classifier over the frozen base's hidden state that chooses one adapter, or a "
        "mixture, for each request. Used by distft chat FOLDER and distft eval RUN --model FOLDER.",
    )
    made.add_argument("action", choices=["train"], help="train: on rows that are labelled by their adapter")
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML: name, [router], and [[adapters]] with rows")
    made.add_argument(
        "--min-accuracy", type=_share, metavar="X", help="fail below this share of right choices on held-out rows"
    )
    add_json(made)
    return made


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return share
