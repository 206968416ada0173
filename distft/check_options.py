"""The flags of `distft check`, apart from its code, which reads rows and imports what that takes."""

from __future__ import annotations

from distft.core.command_line import CommandParser, add_json, add_overrides


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft check",
        description="Show what a recipe's data becomes: counts, lengths, masks. Touches no GPU and loads no weights.",
    )
    made.add_argument("recipe", metavar="RECIPE", help="a TOML recipe")
    made.add_argument("--samples", type=int, default=2, metavar="N", help="rows to show of each split (default 2)")
    add_overrides(made)
    add_json(made)
    made.add_argument("--card", metavar="FILE", help="write a data card (Markdown) as well")
    return made
