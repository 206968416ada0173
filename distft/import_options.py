"""The flags of `distft import`, apart from its code, which imports the tables of every tool."""

from __future__ import annotations

from pathlib import Path

from distft.core.command_line import CommandParser, add_json, add_overrides, at_least_one


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft import",
        description="Make a recipe of another tool's configuration file: Axolotl, LLaMA-Factory, TRL, torchtune, or a "
        "job of OpenAI's API. What means something else here stands in comments, what has no counterpart is listed.",
    )
    made.add_argument("file", type=Path, metavar="FILE", help="a YAML or JSON file")
    made.add_argument("--to", type=Path, metavar="RECIPE", help="write the recipe here instead of printing it")
    made.add_argument("--force", action="store_true", help="overwrite the recipe that --to names")
    made.add_argument("--from", dest="tool", metavar="TOOL", help="whose file it is, when that is not clear")
    made.add_argument("--gpus", type=at_least_one, metavar="N", help="GPUs the file was meant for (1), in all nodes")
    made.add_argument("--task", metavar="NAME", help="sft, dpo, ...: what a file of TRL was given to, `trl NAME`")
    add_overrides(made)
    add_json(made)
    return made
