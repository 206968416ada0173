"""A merged or exported folder made again from what it was made of, its files held against the first ones by hash."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distft.core.errors import DONE, CheckpointError, Problem, RecipeError
from distft.core.files import read_json_object

MERGE, EXPORT, COMBINE, ROUTER = "merge.json", "certificate.json", "combine.json", "router.json"
_EDITED = "README.md"
"""People write in it, and exports of a run add a section to it."""
OTHER_WEIGHTS, DIFFERS = 4, 1

Say = Callable[[str], None]


def is_made_folder(folder: Path) -> bool:
    """Return whether `distft merge`, `distft export`, `distft adapters combine` or `distft router` wrote the folder."""
    return any((folder / name).is_file() for name in (MERGE, EXPORT, COMBINE, ROUTER))


def reproduce(options: argparse.Namespace, say: Say) -> tuple[dict[str, Any], int]:
    """Make the folder again beside nothing, compare, and return (result, exit code): 0, 1 (differs), 4 (other inputs).

    Raises:
        RecipeError: flags of runs, or a source that is not there any more.
        CheckpointError: the folder's own files are not what was written.
    """
    given = {"--nproc": options.nproc, "--steps": options.steps, "--against": options.against}
    given["--output-dir"] = options.output_dir
    if named := [flag for flag, value in given.items() if value is not None]:
        problem = Problem(message=f"{named[0]}: is of runs, and {options.run} is a made folder", fix="leave it out")
        raise RecipeError("distft reproduce", [problem])
    folder: Path = options.run
    if (folder / EXPORT).is_file():
        content = _read(folder / EXPORT, ("format", "files", "source", "levels"))
        return _export(folder, content, say, only_check=options.only_check)
    if (folder / COMBINE).is_file() and not (folder / MERGE).is_file():
        report = _read(
            folder / COMBINE, ("how", "params", "weights", "sources", "base_sha256", "asked", "files_sha256")
        )
        return _combine(folder, report, say, only_check=options.only_check)
    if (folder / ROUTER).is_file():
        keys = ("recipe", "cwd", "adapters", "base", "base_sha256", "rows_sha256", "files_sha256")
        return _router(folder, _read(folder / ROUTER, keys), say, only_check=options.only_check)
    report = _read(folder / MERGE, ("source", "base", "adapter_sha256", "files_sha256", "dtype", "quantized"))
    return _merge(folder, report, say, only_check=options.only_check)


def _read(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return what the file says.

    Raises:
        CheckpointError: it cannot be read, or lacks something.
    """
    content = read_json_object(file)
    if missing := [key for key in keys if key not in content]:
        raise CheckpointError(f"{file}: cannot be read, or lacks {missing[0]}  fix: make the folder again")
    return content


def _merge(folder: Path, report: Mapping[str, Any], say: Say, *, only_check: bool) -> tuple[dict[str, Any], int]:
    from distft.adapter_sources import find_source
    from distft.merging import merging
    from distft.merging.adapter_folder import AdapterFolder

    then = dict(report["files_sha256"])
    _refuse_damage(folder, then, _hashes(folder, then))
    source = find_source(str(report["source"]), str(report["base"]))
    say(f"{folder}: merged from {report['source']} and {report['base']}")
    if AdapterFolder(source.adapter).digest() != report["adapter_sha256"]:
        say(f"  ! {report['source']}: another adapter than was merged; there is nothing to reproduce")
        return {"folder": str(folder), "verdict": "other inputs", "changed": []}, OTHER_WEIGHTS
    if changed := _changed_base(source.base, report.get("base_sha256"), say):
        return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
    _say_versions(report.get("versions") or {}, say)
    if only_check:
        return {"folder": str(folder), "verdict": "inputs as they were"}, DONE
    with tempfile.TemporaryDirectory(prefix=".distft-again-", dir=folder.absolute().parent) as name:
        made = merging.merge(
            source,
            Path(name) / "again",
            rows=None,
            dtype=merging.DTYPES[report["dtype"]],
            quantize=bool(report["quantized"]),
        )
        return _held_against(folder, then, made.files_sha256, say)


def _combine(folder: Path, report: Mapping[str, Any], say: Say, *, only_check: bool) -> tuple[dict[str, Any], int]:
    from distft.adapter_sources import find_places
    from distft.merging import combining
    from distft.merging.delta_sources import source_digest
    from distft.merging.hows import HOWS
    from distft.merging.merging import DTYPES

    then, asked = dict(report["files_sha256"]), report["asked"]
    _refuse_damage(folder, then, combining.made_hashes(folder))
    named = [str(source["path"]) for source in report["sources"]]
    places, base, in_4bit = find_places(named, asked["base"])
    say(f"{folder}: {report['how']} of {', '.join(named)}")
    changed = [str(place) for place, source in zip(places, report["sources"], strict=True)
               if source_digest(place) != source["sha256"]]  # fmt: skip
    if changed:
        say(f"  ! {changed[0]} is not what was combined; there is nothing to reproduce")
        return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
    if changed := _changed_base(base, report["base_sha256"], say):
        return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
    _say_versions(report.get("versions") or {}, say)
    if only_check:
        return {"folder": str(folder), "verdict": "inputs as they were"}, DONE
    how = HOWS[report["how"]]
    options = combining.CombineOptions(
        how=how,
        params=how.params.model_validate_json(json.dumps(report["params"])),
        weights=tuple(report["weights"]),
        rank=asked["rank"],
        whole=asked["whole"],
        dtype=None if asked["dtype"] is None else DTYPES[asked["dtype"]],
        named_base=asked["base"],
    )
    with tempfile.TemporaryDirectory(prefix=".distft-again-", dir=folder.absolute().parent) as name:
        made = combining.combine(places, base, Path(name) / "again", options, in_4bit=in_4bit)
        return _held_against(folder, then, made.files_sha256, say)


def _router(folder: Path, report: Mapping[str, Any], say: Say, *, only_check: bool) -> tuple[dict[str, Any], int]:
    from distft.routing.router import adapter_digest
    from distft.routing.router_recipe import RouterRecipe
    from distft.routing.training import made_hashes, train_router

    then = dict(report["files_sha256"])
    _refuse_damage(folder, then, made_hashes(folder))
    say(f"{folder}: a router among {', '.join(adapter['path'] for adapter in report['adapters'])}")
    changed = [one["path"] for one in report["adapters"] if adapter_digest(Path(one["path"])) != one["sha256"]]
    if changed:
        say(f"  ! {changed[0]} is not the adapter that it was trained among; there is nothing to reproduce")
        return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
    if changed := _changed_base(Path(report["base"]), report["base_sha256"], say):
        return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
    _say_versions(report.get("versions") or {}, say)
    if only_check:
        return {"folder": str(folder), "verdict": "inputs as they were"}, DONE
    recipe = RouterRecipe.model_validate_json(json.dumps(report["recipe"]))
    with tempfile.TemporaryDirectory(prefix=".distft-again-", dir=folder.absolute().parent) as name:
        place = Path(name).absolute()
        with contextlib.chdir(report["cwd"] if Path(report["cwd"]).is_dir() else Path.cwd()):
            again = recipe.model_copy(update={"output_dir": str(place), "name": "again"})
            made = train_router(again, str(folder / ROUTER), _silent)
        rows = [one for one, sha256 in report["rows_sha256"].items() if made["rows_sha256"].get(one) != sha256]
        if rows:
            say(f"  ! the rows of {rows[0]} are not those that it was trained on; there is nothing to reproduce")
            return {"folder": str(folder), "verdict": "other inputs", "changed": rows}, OTHER_WEIGHTS
        return _held_against(folder, then, made["files_sha256"], say)


def _silent(line: str) -> None:
    """Drop a line."""


def _export(folder: Path, content: Mapping[str, Any], say: Say, *, only_check: bool) -> tuple[dict[str, Any], int]:
    from distft.catalog import PLUGINS
    from distft.export_formats import EXPORT_FORMATS, certificate
    from distft.export_formats.command import make_inputs
    from distft.export_formats.noted_options import given_of
    from distft.export_formats.source import open_source
    from distft.model.adapters.whole import base_of

    PLUGINS.load()
    then = {name: entry["sha256"] for name, entry in content["files"].items()}
    _refuse_damage(folder, then, {name: entry["sha256"] for name, entry in certificate.hashes(folder).items()})
    if "options" not in content or (spec := EXPORT_FORMATS.get(content["format"])) is None:
        problem = f"{folder / EXPORT} does not say what it was asked for: it is older, or of a plugin that is gone"
        raise RecipeError("distft reproduce", [Problem(message=problem, fix="export it once more")])
    options, params = given_of(content["options"], spec)
    with (
        tempfile.TemporaryDirectory(prefix=".distft-again-", dir=folder.absolute().parent) as name,
        contextlib.chdir(_was_in(content)),
    ):
        source = open_source(options.source, Path(name))
        say(f"{folder}: {content['format']} of {options.source}")
        changed = list(_changed(content["source"]["files"], certificate.hashes(source.folder)))
        if changed:
            say(f"  ! {changed[0]} of {options.source} is not what was exported; there is nothing to reproduce")
            return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
        if source.is_adapter:
            then_base = (content["source"].get("base") or {}).get("files")
            if changed := _changed_base(base_of(source.folder), then_base, say):
                return {"folder": str(folder), "verdict": "other inputs", "changed": changed}, OTHER_WEIGHTS
        _say_versions(content.get("versions") or {}, say)
        if only_check:
            return {"folder": str(folder), "verdict": "inputs as they were"}, DONE
        inputs = make_inputs(
            source,
            Path(name),
            None if options.rows is None else Path(options.rows),
            options.num_rows,
            calibration=options.calibration,
            num_calibration=options.num_calibration,
        )
        again = Path(name) / "again"
        again.mkdir()
        files: list[str] = []
        for level in content["levels"]:
            files += spec.write(params, inputs, again, level["level"]).files
        wanted = {file: then[file] for level in content["levels"] for file in level["files"] if file in then}
        return _held_against(folder, wanted, _hashes(again, files), say)


def _changed_base(base: Path, then: Mapping[str, str] | None, say: Say) -> list[str]:
    """Return names of files of an adapter's base that are not as they were, and say the first."""
    from distft.merging.base_model import base_hashes

    if not then:
        say(f"  ~ {base}: no hash of the base was written; another one shows in what comes out")
        return []
    changed = list(_changed(then, base_hashes(base)))
    if changed:
        say(f"  ! {base / changed[0]}: the base is not what it was; there is nothing to reproduce")
    return [str(base / name) for name in changed]


def _was_in(content: Mapping[str, Any]) -> Path:
    place = Path(str(content["options"].get("cwd", ".")))
    return place if place.is_dir() else Path.cwd()


def _hashes(folder: Path, names: Any) -> dict[str, str]:
    import hashlib

    made = {}
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                made[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return made


def _refuse_damage(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse a folder whose own files have changed since.

    Raises:
        CheckpointError: names the first.
    """
    if changed := list(_changed(then, now)):
        raise CheckpointError(
            f"{folder / changed[0]} is not what was written there: changed, missing or new  "
            "fix: take the folder from where it was kept, or make it again"
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    return (name for name in sorted({*then, *now}) if name != _EDITED and then.get(name) != now.get(name))


def _say_versions(then: Mapping[str, str], say: Say) -> None:
    from distft.core import environment

    now = environment.versions()
    for name, before in then.items():
        if name in now and now[name] != before:
            say(f"  ~ {name}: {before} then, {now[name]} now")


def _held_against(
    folder: Path, then: Mapping[str, str], now: Mapping[str, str], say: Say
) -> tuple[dict[str, Any], int]:
    different = list(_changed(then, now))
    for name in different:
        say(f"  {name}: other bytes" if name in then and name in now else f"  {name}: in one of the two alone")
    equal = len(then) - len([name for name in different if name in then])
    verdict = "differs" if different else "equal"
    say(
        f"reproduced: {equal} files, equal bit for bit"
        if not different
        else f"not reproduced: {equal} of {len(then)} files are equal"
    )
    result = {"folder": str(folder), "verdict": verdict, "files": len(then), "different": different}
    return result, DIFFERS if different else DONE
