"""`distft chat SOURCE`: the flags, and the loop that reads lines."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.command_line import CommandParser, add_json, at_least_one
from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE, Problem, RecipeError

if TYPE_CHECKING:
    from distft.chat.session import Session


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft chat",
        description="Chat with a trained model in the terminal: answers are shown as they are written; see /help.",
    )
    made.add_argument(
        "source", metavar="SOURCE", help="a run, RUN/checkpoints/step-…, or a folder of a model, adapter or router"
    )
    made.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another adapter of the same base, chosen with /adapter NAME; repeat",
    )
    made.add_argument("--base", action="store_true", help="the base model answers as well, beside the tuned one")
    made.add_argument("--prompt", metavar="TEXT", help="ask this and end")
    made.add_argument("--system", default="", metavar="TEXT", help="system text of the conversation")
    made.add_argument(
        "--max-new-tokens", type=at_least_one, default=512, metavar="N", help="most tokens of an answer (512)"
    )
    made.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0: always the likeliest token (0)"
    )
    made.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="draw from the likeliest tokens alone (1)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of drawn answers (0)")
    add_json(made)
    return made


def _temperature(text: str) -> float:
    return _number(text, 0.0, 100.0)


def _share(text: str) -> float:
    return _number(text, 1e-6, 1.0)


def _number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, not {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    given = parser().parse_args(argv)
    try:
        _chat(given)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, 0)
        return exit_code(error)
    return DONE


def _chat(given: argparse.Namespace) -> None:
    if given.json and given.prompt is None:
        raise _mistake("--json: is for one answer", "give --prompt TEXT")
    adapters = dict(_named(text) for text in given.adapters)
    if len(adapters) < len(given.adapters):
        raise _mistake("--adapter: one name is given twice", "name each adapter once")
    from distft.chat.models import ChatModels
    from distft.chat.session import Session, as_json
    from distft.core.log import quiet_libraries
    from distft.generation.completion import SamplingParams

    quiet_libraries()
    how = SamplingParams(
        max_new_tokens=given.max_new_tokens, temperature=given.temperature, top_p=given.top_p, seed=given.seed
    )
    with tempfile.TemporaryDirectory(prefix="distft-chat-") as name:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there; it is for answers alone
            models = ChatModels(given.source, adapters, Path(name), with_base=given.base)
        write = _quiet if given.json else _write
        session = Session(models, how, name="tuned", compare=given.base, write=write, system=given.system)
        if given.prompt is None:
            _loop(session)
            return
        replies = session.ask(given.prompt)
        if given.json:
            print(as_json(given.prompt, replies))


def _loop(session: Session) -> None:
    """Read lines until the end of input or /quit."""
    shows = sys.stdin.isatty()
    if shows:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrows and history for input()
    while True:
        try:
            line = input("> " if shows else "")
        except EOFError:
            return
        if not session.take(line):
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _quiet(text: str) -> None:
    """Say nothing: the answer is printed as JSON."""


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).resolve().name, text
    if name == "final":  # the usual place of a run's adapter
        name = Path(folder).resolve().parent.name
    if name in ("tuned", "base", "default", "") or "." in name:
        raise _mistake(
            f"--adapter {text}: cannot be named {name!r}", "write NAME=FOLDER with another name without dots"
        )
    place = Path(folder).expanduser()
    place = place / "final" if (place / "final" / "adapter_config.json").is_file() else place
    if not (place / "adapter_config.json").is_file():
        raise _mistake(f"--adapter {text}: {place} holds no adapter_config.json", "give a folder in PEFT's form")
    return name, place


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("distft chat", [Problem(message=message, fix=fix)])
