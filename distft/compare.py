"""`distft compare RUN...`: several runs side by side, as one HTML page or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distft.core.command_line import CommandParser, add_json, add_price
from distft.core.errors import DONE, DistftError, FileSystemError


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft compare", description="Runs side by side: quality, memory, speed, cost, settings that differ."
    )
    made.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders, or folders of run folders")
    made.add_argument("--out", type=Path, metavar="FILE", default=Path("compare.html"), help="(default: compare.html)")
    add_price(made)
    add_json(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        _run(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return DONE


def _run(options: argparse.Namespace) -> None:
    from distft.report.command import save
    from distft.report.comparison import comparison_page, line, settings_that_differ
    from distft.run_record import read_run
    from distft.status import runs_in

    folders = []
    for path in options.runs:
        run_folders = runs_in(path)
        if not run_folders:
            raise FileSystemError(f"{path}: no run folder, and none in it")
        folders += run_folders
    runs = [read_run(folder) for folder in folders]
    if options.json:
        differing = {
            key: dict(zip(map(str, folders), values, strict=True)) for key, values in settings_that_differ(runs)
        }
        content = {"runs": [asdict(line(run, options.price)) for run in runs], "settings_that_differ": differing}
        print(json.dumps(content))
        return
    save(options.out, comparison_page(runs, price=options.price))
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
