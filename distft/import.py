"""`python -m distft.import FILE`: another tool's configuration file becomes a recipe.

The recipe goes to standard output or to a file, what was not carried over to standard error as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distft.catalog import REGISTRIES
from distft.core.errors import DONE, DistftError, FileSystemError
from distft.core.files import replace_file
from distft.import_options import parser
from distft.importers import IMPORTERS, Imported, ImportOptions, import_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        _refuse_overwriting(options.to, options.force)
        import_options = ImportOptions(gpus=options.gpus, task=options.task, overrides=tuple(options.overrides))
        imported = import_config(
            options.file, importers=IMPORTERS, registries=REGISTRIES, tool=options.tool, options=import_options
        )
        if options.to is not None:
            _write(options.to, imported.toml)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(imported.to_json(), indent=1, ensure_ascii=False))
    elif options.to is None:
        print(imported.toml, end="")
    print(_summary(imported, options.to), file=sys.stderr)
    return DONE


def _refuse_overwriting(path: Path | None, force: bool) -> None:
    if path is None:
        return
    if path.is_dir():
        raise FileSystemError(f"{path}: is a folder  name a file, such as {path / 'recipe.toml'}")
    if path.exists() and not force:
        raise FileSystemError(f"{path}: exists, and was not overwritten  name another file, or say --force")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise FileSystemError(f"{path}: cannot be written ({error.strerror})") from None


def _summary(imported: Imported, to: Path | None) -> str:
    """Return what a person should look at."""
    lines = [f"import: a file of {IMPORTERS[imported.tool].title}" + (f" became {to}" if to else "")]
    lines.append(f"  {len(imported.changed)} keys with a comment: read them")
    for title, remarks in (("not carried over", imported.left), ("not known to this importer", imported.unknown)):
        if remarks:
            lines += [f"  {title}:", *(f"    {remark}" for remark in remarks)]
    lines.append(f"next: distft check {to or 'RECIPE'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
