"""The flags of `distft serve`, apart from its code, which imports a web server."""

from __future__ import annotations

from pathlib import Path

from distft.core.command_line import CommandParser, add_site

RUNNER_NAMES = ("local", "slurm")


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft serve",
        description="Serve OpenAI's fine-tuning API under /v1: files, jobs in a queue, checkpoints, and chat with what "
        "was trained. The first admin key is taken from DISTFT_API_KEY; without it one is made, and printed once.",
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    made.add_argument("--port", type=int, default=8600, metavar="PORT", help="0: a free one (8600)")
    made.add_argument(
        "--data", type=Path, default=Path("distft-data"), metavar="DIR", help="files, jobs and runs (distft-data)"
    )
    made.add_argument("--database", metavar="URL", help="postgresql+psycopg://… (default: SQLite in DIR)")
    made.add_argument("--runner", choices=RUNNER_NAMES, default="local", help="where jobs run (local)")
    made.add_argument(
        "--models", type=Path, metavar="FILE", help="TOML: the models that may be trained (default: a tiny one)"
    )
    add_site(made)
    return made
