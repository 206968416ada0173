"""The command-line library: argparse with strict flags, hints for mistyped words, and the flags that verbs share.

Nothing heavy is imported here: a verb's help and shell completion are made from its parser alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distft.core.nearest import nearest

USAGE_ERROR = 2
"""Exit code of a command line that cannot be read: the same as that of a faulty recipe."""


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no abbreviated flags and names the nearest flag or value of a mistyped one."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # without its overloads
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse every argument; one that is left over ends the process with code 2 and the nearest flag."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            self.error(self._left_over(left))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the usage and the mistake, and end the process with code 2."""
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")

    def arguments(self) -> list[argparse.Action]:
        """Return what this parser takes, `--help` included, in the order in which it was added."""
        return list(self._actions)

    def flags(self) -> list[str]:
        """Return every flag this parser takes."""
        return [flag for action in self._actions for flag in action.option_strings]

    def _left_over(self, left: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in left if word.startswith("-")]
        if not flags:
            return f"unexpected arguments: {' '.join(left)}"
        hints = [f"unknown flag {flag}{_hint(flag, self.flags())}" for flag in flags]
        return "; ".join(hints)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            message = f"invalid choice: {value!r}{_hint(str(value), allowed)}  allowed: {', '.join(allowed)}"
            raise argparse.ArgumentError(action, message)


def _hint(word: str, allowed: Sequence[str]) -> str:
    meant = nearest(word, allowed)
    return f"  did you mean {meant}?" if meant else ""


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """Return the arguments without `flag` and its value, written `--flag VALUE` or `--flag=VALUE`."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        if not (is_value or argument == flag or argument.startswith(f"{flag}=")):
            kept.append(argument)
        is_value = argument == flag and not is_value
    return kept


def at_least_one(text: str) -> int:
    """Read a count of at least 1, for `type=` of a flag."""
    number = int(text) if text.lstrip("-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return number


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set TABLE.KEY=VALUE`, read as `overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="change one key of the recipe; repeat",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: one JSON object on standard output."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--output-dir DIR`, read as a path or None."""
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder of run folders, instead of the recipe's output_dir"
    )


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add `--nproc N`: how many processes to start on this machine."""
    parser.add_argument(
        "--nproc",
        type=at_least_one,
        metavar="N",
        help="processes to start on this machine; `distft VERB` starts one per GPU by default",
    )


def add_site(parser: argparse.ArgumentParser) -> None:
    """Add `--site FILE`: what is particular to a cluster."""
    parser.add_argument("--site", type=Path, metavar="FILE", help="TOML file of the cluster; see cluster/sites/")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add `--gpu`, `--gpus` and `--nodes`: the machine that is planned for."""
    parser.add_argument("--gpu", metavar="NAME|GiB", help="a GPU of the catalogue, or its usable memory (h100-80gb)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in each node (1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (1)")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`: the model's config where its folder is not on this machine."""
    parser.add_argument("--config", metavar="FILE", help="the model's config.json, where its folder is not here")


def add_price(parser: argparse.ArgumentParser) -> None:
    """Add `--price PER_GPU_HOUR`."""
    parser.add_argument("--price", type=float, metavar="PER_GPU_HOUR", help="what a GPU costs an hour")
