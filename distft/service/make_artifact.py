"""`python -m distft.service.make_artifact FOLDER`: an artifact is made by the command that people call for it.

A process of its own: it needs torch, which the server does not load, and what it does to memory is its own. It ends
when the server that started it does. Its answer is a file, so that a server that was killed finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import tomllib
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from distft.core.errors import DataError, DistftError, FileSystemError, MachineError, NumericError, RecipeError
from distft.core.files import sync_file, sync_folder
from distft.core.log import quiet_libraries
from distft.service.artifact_archive import plain_files
from distft.service.artifact_folder import ArtifactFolder

LOOKS_S = 1.0
MAX_ROWS = 64
"""Prompts that are given an answer: no more are compared."""
_CODES = {
    RecipeError: "cannot_be_made",
    DataError: "invalid_rows",
    NumericError: "not_what_its_source_is",
    FileSystemError: "file_system_error",
    MachineError: "machine_error",
}
_PATH = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/'\"`,;:()<>]+/)+([^\s/'\"`,;:()<>]*)")
"""An absolute path in a text; an URL is none, nor is `and/or`."""


def main(argv: list[str]) -> int:
    """Make one artifact, and write what was found."""
    folder = ArtifactFolder(path=Path(argv[0]))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    quiet_libraries()
    request = folder.request()
    try:
        made: dict[str, Any] = {"proof": make(folder, request)}
    except DistftError as error:
        code = _CODES.get(type(error), f"{error.kind.replace(' ', '_')}_error")
        made = {"error": {"code": code, "message": str(error), "param": None}}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = f"The command ended with {type(error).__name__}: {error}"
        made = {"error": {"code": "internal_error", "message": message, "param": None}}
    folder.write_made(without_paths(made, request["names"]))
    return 0


def make(folder: ArtifactFolder, request: Mapping[str, Any]) -> dict[str, Any]:
    """Make what a request asks for as the folder's content, and return what was found when it was compared.

    Raises:
        DistftError: it cannot be made, or is not what it was made of.
    """
    out, settings = folder.content, request["settings"]
    match request["kind"]:
        case "export":
            proof = _export(_given(request["sources"][0]), out, settings)
        case "merge":
            folder.work.mkdir()
            source = _as_run(request["sources"][0], folder.work / "0")
            proof = _merge(source, out, settings, rows=_rows_of(source, folder.work))
        case _:
            folder.work.mkdir()
            runs = [_as_run(source, folder.work / str(number)) for number, source in enumerate(request["sources"])]
            proof = _combine(runs, out, settings)
    for file in plain_files(out, ""):
        sync_file(file.path)
        sync_folder(file.path.parent)
    return proof


def _export(source: Path, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    from distft.export_formats.command import export
    from distft.export_options import parser

    level = ["--level", settings["level"]] if settings["level"] else []
    given = _parsed(parser(), [str(source), "--as", settings["format"], "--out", str(out), *level, "--json"])
    with contextlib.redirect_stdout(sys.stderr):
        certificate = export(given)
    return {name: certificate[name] for name in ("proven", "rows", "levels", "versions", "machine")}


def _merge(source: Path, out: Path, settings: Mapping[str, Any], *, rows: Path | None) -> dict[str, Any]:
    from distft.merge import merge_source
    from distft.merge_options import parser

    dtype = ["--dtype", settings["dtype"]] if settings["dtype"] else []
    compared = ["--rows", str(rows)] if rows is not None else []
    given = _parsed(parser(), [str(source), "--out", str(out), *dtype, *compared, "--json"])
    with contextlib.redirect_stdout(sys.stderr):
        report = merge_source(given).to_json()
    names = ("comparison", "max_kl", "dtype", "formulas", "base_in_4bit", "untied", "versions")
    return {name: report[name] for name in names}


def _combine(sources: Sequence[Path], out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    from distft.adapters import combine_sources
    from distft.adapters_options import parser

    flags = ["--how", settings["how"]]
    if settings["weights"] is not None:
        plain = [format(Decimal(repr(weight)), "f") for weight in settings["weights"]]  # -1e-05 would read as a flag
        flags += ["--weights", *plain]
    if settings["rank"] is not None:
        flags += ["--rank", str(settings["rank"])]
    for name, value in settings["settings"].items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name}={value!r}")
    given = _parsed(parser(), ["combine", *map(str, sources), *flags, "--out", str(out), "--json"])
    with contextlib.redirect_stdout(sys.stderr):
        report = combine_sources(given).to_json()
    names = ("how", "params", "weights", "rank", "relative_error", "versions")
    return {name: report[name] for name in names} | {"tensors": len(report["tensors"])}


def _parsed(parser: Any, words: list[str]) -> Namespace:
    print("distft:", parser.prog, *words, file=sys.stderr, flush=True)
    return parser.parse_args(words)


def _given(source: Mapping[str, Any]) -> Path:
    """Return what the command line calls a model or a checkpoint."""
    run, step = Path(source["run"]), source["step"]
    return run if step is None else run / "checkpoints" / f"step-{step:08d}"


def _as_run(source: Mapping[str, Any], place: Path) -> Path:
    """Return a run's folder, which the verbs of adapters take: of a checkpoint one that would have ended there."""
    run = Path(source["run"])
    if source["step"] is None:
        return run
    from distft.export_formats.checkpoint_folder import rebuild

    place.mkdir()
    final = rebuild(run, _given(source), place / "rebuilt")
    shutil.copyfile(run / "recipe.toml", place / "recipe.toml")
    final.rename(place / "final")
    return place


def _rows_of(run: Path, work: Path) -> Path | None:
    """Return rows that a merged model is compared on; None: the run's held-out rows.

    Without a validation file they are the training rows: what is compared are two models that must be one, and any
    rows will do. Rows that are prompts alone are given an answer, the question again, as formats with answers need one.
    """
    data = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["data"]
    if data.get("eval"):
        return None
    train = data["train"][0]
    if train.get("format") != "prompt":
        return Path(train["path"])
    rows = work / "rows.jsonl"
    with Path(train["path"]).open(encoding="utf-8-sig") as prompts, rows.open("w", encoding="utf-8") as answered:
        for line in islice((line for line in prompts if line.strip()), MAX_ROWS):
            messages = json.loads(line)["messages"]
            answer = {"role": "assistant", "content": messages[-1]["content"]}
            answered.write(json.dumps({"messages": [*messages, answer]}) + "\n")
    return rows


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """Return JSON whose texts tell no path of this machine.

    Args:
        value: the JSON.
        names: path -> what it is to people; of other paths the last part is left.
    """
    if isinstance(value, dict):
        return {key: without_paths(entry, names) for key, entry in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return [without_paths(entry, names) for entry in value]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(value, str):
        return value
    for path in sorted(names, key=len, reverse=True):
        value = value.replace(path, names[path])
    return _PATH.sub(r"\1", value)


def _end_with_parent(parent: int) -> None:
    """End this process and those that it started once the server is gone: the next one begins anew."""
    while os.getppid() == parent:
        time.sleep(LOOKS_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
