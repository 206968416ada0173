"""The flags of the main job, for `distft train`, `python -m distft.train` and everything that passes them on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from distft.core.command_line import CommandParser, add_nproc, add_output_dir, add_overrides


def parser() -> CommandParser:
    """Return the parser of the main job's command line."""
    made = CommandParser(
        prog="distft train",
        description="Fine-tune as a recipe says. `distft train` starts one process per GPU of this machine; "
        "`python -m distft.train` is one process, of a launcher's or alone.",
    )
    made.add_argument("recipe", metavar="RECIPE", help="a TOML recipe")
    add_overrides(made)
    add_output_dir(made)
    made.add_argument(
        "--resume", type=_resume, default="auto", metavar="auto|never|DIR", help="where to continue (default: auto)"
    )
    made.add_argument("--allow-changes", action="store_true", help="continue under a changed learning rate or length")
    add_nproc(made)
    return made


def _resume(text: str) -> Literal["auto", "never"] | Path:
    return text if text in ("auto", "never") else Path(text)  # pyright: ignore[reportReturnType]
