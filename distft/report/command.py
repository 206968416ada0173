"""`distft report RUN`: the run as one HTML page, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distft.core.command_line import CommandParser, add_price
from distft.core.errors import DONE, DistftError, FileSystemError

PAGE = "report.html"


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft report", description="A run as one HTML page: no network, no script; finished or not."
    )
    made.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    made.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the run folder)")
    add_price(made)
    made.add_argument("--no-data", action="store_true", help="do not look at the rows where nobody has yet")
    made.add_argument("--open", action="store_true", help="show it in a browser")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        out = _write(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(out)
    if options.open:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())
    return DONE


def _write(options: argparse.Namespace) -> Path:
    from distft.export.model_card import refresh
    from distft.report import run_page, with_care
    from distft.run_record import read_run
    from distft.status import read_status, runs_in

    if runs_in(options.run) != [options.run]:
        raise FileSystemError(f"{options.run}: not a run folder; distft report wants output_dir/name")
    run, no_card = read_run(options.run), "it was not asked for (--no-data)"
    if not options.no_data:
        run, no_card = with_care(run)
    text = run_page(run, read_status(options.run), price=options.price, no_card=no_card)
    out: Path = options.out or options.run / PAGE
    save(out, text)
    refresh(run)
    return out


def save(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        FileSystemError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileSystemError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None
