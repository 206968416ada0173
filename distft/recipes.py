"""`distft recipes [list|copy NAME]`: the recipes, launch files and cluster files that come with distft.

A checkout has them at its root, an installed package in `distft/shipped/`, where setup.py puts them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distft.core.command_line import CommandParser, add_json
from distft.core.errors import DONE, DistftError, FileSystemError

FOLDERS = {"recipes": "Recipes", "launch": "Launch files (accelerate launch --config_file FILE)", "cluster": "Clusters"}
SCHEMA = "recipes/schema.json"
_LONGEST_SUMMARY = 100
_KINDS = (".toml", ".yaml", ".sbatch")
_LAUNCH_FILE = re.compile(r"\blaunch/[\w.-]+\.yaml")


@dataclass(frozen=True, kw_only=True)
class ShippedFile:
    """One of the files."""

    name: str
    """What `copy` takes: a recipe's own name, or the file's path."""
    file: str
    """Its path below the folder that `copy` writes to."""
    summary: str
    """The first sentence of its first comment."""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft recipes",
        description="List the recipes, launch files and cluster files that come with distft, or copy one of them. "
        "A recipe is copied with the launch file that it names and with the schema for editors.",
    )
    made.add_argument("action", choices=("list", "copy"), nargs="?", default="list", help="list (default) or copy")
    names = [shipped.name for shipped in _files(root)] if (root := _root()) else []
    made.add_argument("name", metavar="NAME", choices=names, nargs="?", help="what to copy, as listed")
    made.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="copy below this folder (default: here)")
    add_json(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    made = parser()
    options = made.parse_args(argv)
    if (options.action == "copy") != (options.name is not None):
        made.error("copy NAME copies one of the listed files; list takes no name")
    try:
        if options.action == "copy":
            paths = copy(options.name, options.to)
            print(json.dumps({"files": paths}) if options.json else "\n".join(paths))
        else:
            listed = list_files()
            print(json.dumps([asdict(shipped) for shipped in listed], indent=1) if options.json else _text(listed))
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return DONE


def list_files() -> list[ShippedFile]:
    """Return every file that comes with distft, recipes first.

    Raises:
        FileSystemError: this installation has none.
    """
    return list(_files(_existing_root()))


def copy(name: str, to: Path) -> list[str]:
    """Copy a file, and what it names, to the same paths below `to`; return those paths. An equal file stays as it is.

    Raises:
        FileSystemError: another file is in one of the places, or one cannot be written; nothing is overwritten.
    """
    root = _existing_root()
    chosen = next(shipped for shipped in _files(root) if shipped.name == name)
    files = [chosen.file]
    if chosen.file.startswith("recipes/"):
        files += sorted(set(_LAUNCH_FILE.findall((root / chosen.file).read_text(encoding="utf-8"))))
        if not (to / SCHEMA).exists():  # one that is there may be of another version, and serves editors alone
            files.append(SCHEMA)
    different = [str(to / file) for file in files if _is_taken(to / file, (root / file).read_bytes())]
    if different:
        raise FileSystemError(
            f"{', '.join(different)}: exists and differs; nothing was copied. Name a folder with --to"
        )
    try:
        for file in files:
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            (to / file).write_bytes((root / file).read_bytes())
    except OSError as error:
        raise FileSystemError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return [str(to / file) for file in files]


def _is_taken(path: Path, content: bytes) -> bool:
    return path.exists() and not (path.is_file() and path.read_bytes() == content)


def _root() -> Path | None:
    """Return the folder that has recipes/, launch/ and cluster/: of the installed package, or of a checkout."""
    package = Path(__file__).parent
    return next((root for root in (package / "shipped", package.parent) if (root / SCHEMA).is_file()), None)


def _existing_root() -> Path:
    if (root := _root()) is None:
        raise FileSystemError("this installation of distft has no recipes: it was not made from a wheel or a checkout")
    return root


def _files(root: Path) -> Iterator[ShippedFile]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _KINDS:
                file = path.relative_to(root).as_posix()
                name = path.stem if folder == "recipes" else file
                yield ShippedFile(name=name, file=file, summary=_summary(path.read_text(encoding="utf-8")))


def _summary(text: str) -> str:
    words: list[str] = []
    for line in text.splitlines():
        if line.startswith(("#:", "#!")):
            continue
        if not line.startswith("# "):
            break
        words.append(line[2:])
    return re.split(r"[.:;]?(?:\. |\.$|:$|;$)", " ".join(words), maxsplit=1)[0]


def _text(listed: Sequence[ShippedFile]) -> str:
    width = max(len(shipped.name) for shipped in listed)
    lines: list[str] = []
    for folder, title in FOLDERS.items():
        lines += ["", f"{title}:"] if lines else [f"{title}:"]
        in_folder = (shipped for shipped in listed if shipped.file.startswith(f"{folder}/"))
        lines += [f"  {shipped.name:<{width}}  {_shortened(shipped.summary)}" for shipped in in_folder]
    return "\n".join([*lines, "", "distft recipes copy NAME copies one of them here."])


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SUMMARY else text[: _LONGEST_SUMMARY - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
