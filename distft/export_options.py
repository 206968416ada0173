"""The flags of `distft export`; nothing heavy is imported, so help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.core.command_line import CommandParser, add_json, at_least_one


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft export",
        description="A trained model as a file or folder that other programs run, compared with what was trained "
        "where it will run: certificate.json says how.",
    )
    made.add_argument(
        "source", metavar="SOURCE", help="a run, RUN/checkpoints/step-…, or a folder of a model or adapter"
    )
    made.add_argument(
        "--as",
        dest="format",
        required=True,
        metavar="FORMAT",
        help="safetensors, peft, gguf, ollama, fp8, w8a8, gptq, awq",
    )
    made.add_argument("--out", required=True, type=Path, metavar="PATH", help="folder to write; it must not exist")
    levels = made.add_mutually_exclusive_group()
    levels.add_argument(
        "--level", metavar="L", help="of gguf and ollama: F32, F16 (default), BF16, Q8_0, …; of gptq: W8A16, W4A16"
    )
    levels.add_argument(
        "--levels", choices=["all"], help="every level that can be written here, with size, quality, speed"
    )
    made.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines of prompts or messages to compare on")
    made.add_argument(
        "--num-rows", type=at_least_one, metavar="N", help="compare on so many prompts (32, or 20 without rows)"
    )
    made.add_argument(
        "--calibration",
        metavar="FILE|none",
        help="rows that rounding is fitted to, as a recipe takes them (the run's training rows); none: no rows",
    )
    made.add_argument("--num-calibration", type=at_least_one, metavar="N", help="so many of them (128)")
    made.add_argument(
        "--max-drop",
        type=_share,
        metavar="X",
        help="fail where a level loses more than this share (0 to 1) of what the run gained on its own rows",
    )
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of the format")
    made.add_argument(
        "--unproven", action="store_true", help="write it where nothing here can run it; the certificate says so"
    )
    made.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload it to the hub, as a private repository; the same command resumes",
    )
    made.add_argument("--message", metavar="TEXT", help="of the commit (what was exported)")
    made.add_argument("--public", action="store_true", help="the repository may be one that everybody reads")
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
