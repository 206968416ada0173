"""`distft export SOURCE --as FORMAT --out PATH`: writes, runs what was written, compares, and keeps it or does not."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE, FileSystemError, Problem, RecipeError
from distft.core.files import read_json_object
from distft.core.nearest import nearest
from distft.export_formats import pushing
from distft.export_formats.noted_options import FILE
from distft.export_options import parser

if TYPE_CHECKING:
    import argparse

    from distft.export_formats.certificate import LevelRecord
    from distft.export_formats.source import ModelSource
    from distft.export_formats.spec import ExportFormatSpec, FormatInputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    given = parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there; it is for the result alone
            certificate = export(given)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, 0)
        return exit_code(error)
    print(
        json.dumps(certificate, indent=1, ensure_ascii=False)
        if given.json
        else "\n".join(_shown(given.out, certificate))
    )
    return DONE


def export(given: argparse.Namespace) -> dict[str, Any]:
    """Write the export and return its certificate; the folder appears whole or not at all.

    Raises:
        DistftError: what is asked for is not there or not possible, or the export does not do what its source does.
    """
    from distft.core.log import quiet_libraries

    spec, params = _format(given)
    out: Path = given.out
    if given.push:
        pushing.refuse_bad_name(given.push)
    elif given.message or given.public:
        raise _mistake("--message and --public: are for --push", "leave them out, or give --push OWNER/NAME")
    if given.push and (out / FILE).is_file():  # the upload of an earlier start goes on
        return _pushed(given, _same_export(given, spec))
    if os.path.lexists(out):
        raise _mistake(f"--out {out}  is there already", "name a folder that is not, or remove it")
    quiet_libraries()
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".distft-export-", dir=out.absolute().parent) as name:
            workdir = Path(name)
            aside = workdir / "export"
            aside.mkdir()
            certificate, source = _exported(given, spec, params, workdir, aside)
            os.replace(aside, out)
    except OSError as error:
        raise FileSystemError(
            f"{out}: cannot be written ({error.strerror or error}); nothing of it is left  "
            "fix: free the disk, or name a folder on another one"
        ) from error
    if source.run is not None:
        from distft.export.model_card import refresh
        from distft.run_exports import note_export
        from distft.run_record import read_run

        note_export(source.run, out, certificate, _commands(certificate, out))
        refresh(read_run(source.run))
    return _pushed(given, certificate)


def _pushed(given: argparse.Namespace, certificate: dict[str, Any]) -> dict[str, Any]:
    """Upload the folder where that is asked for, and say in the result where it is."""
    if not given.push:
        return certificate
    levels = " ".join(level["level"] for level in certificate["levels"]).strip()
    message = given.message or f"{certificate['format']} {levels}".strip() + f" of {certificate['source']['label']}"
    return certificate | {"pushed": pushing.push(given.out, given.push, message=message, public=given.public)}


def _same_export(given: argparse.Namespace, spec: ExportFormatSpec) -> dict[str, Any]:
    """Return the certificate of a folder that the same command wrote.

    Raises:
        RecipeError: it is of another source, format or level, or its files are not what was compared.
    """
    from distft.export_formats import certificate
    from distft.export_formats.noted_options import options_of

    found = read_json_object(given.out / FILE)
    then, now = (dict(each or {}) | {"cwd": ""} for each in (found.get("options"), options_of(given)))
    if found.get("format") != spec.name or then != now:
        raise _mistake(f"--out {given.out}  holds another export", "name a folder that is not there, or remove it")
    if changed := certificate.changed_files(given.out, found):
        raise _mistake(f"--out {given.out}: {changed[0]} is not what was compared", "remove the folder, export again")
    return found


def _format(given: argparse.Namespace) -> tuple[ExportFormatSpec, Any]:
    from distft.catalog import PLUGINS
    from distft.export_formats import EXPORT_FORMATS
    from distft.export_formats.noted_options import params_of

    PLUGINS.load()
    spec = EXPORT_FORMATS.get(given.format)
    if spec is None:
        meant = nearest(given.format, list(EXPORT_FORMATS))
        hint = f'did you mean "{meant}"?  ' if meant else ""
        raise _mistake(f"--as {given.format}  unknown format", f"{hint}allowed: {', '.join(EXPORT_FORMATS)}")
    level = given.level
    if (level or given.levels) and not spec.levels:
        raise _mistake(f"--level: {spec.name} has no levels", "leave it out")
    if level and level not in spec.levels:
        meant = nearest(level, list(spec.levels))
        hint = f"did you mean {meant}?  " if meant else ""
        raise _mistake(f"--level {level}  is none of {spec.name}", f"{hint}allowed: {', '.join(spec.levels)}")
    written = spec.levels if given.levels else (level or spec.default_level,)
    if (given.calibration or given.num_calibration) and not any(map(spec.calibrates, written)):
        flag = "--calibration" if given.calibration else "--num-calibration"
        raise _mistake(f"{flag}: {spec.name} {level or ''}".rstrip() + " fits its rounding to no rows", "leave it out")
    if given.max_drop is not None and not spec.levels:
        raise _mistake(f"--max-drop: {spec.name} rounds nothing", "leave it out")
    return spec, params_of(given.settings, spec)


def _exported(
    given: argparse.Namespace, spec: ExportFormatSpec, params: Any, workdir: Path, aside: Path
) -> tuple[dict[str, Any], ModelSource]:
    from distft.export_formats import certificate, table
    from distft.export_formats.card import write_card
    from distft.export_formats.noted_options import options_of
    from distft.export_formats.source import open_source
    from distft.export_formats.task_score import refuse_without_gain

    source = open_source(given.source, workdir)
    if reason := spec.refuses(params, source):
        raise _mistake(f"{given.source} as {spec.name}: {reason}", "choose another format")
    if given.max_drop is not None:
        refuse_without_gain(given.source, source.run)
    inputs = make_inputs(
        source,
        workdir,
        given.rows,
        given.num_rows,
        calibration=given.calibration,
        num_calibration=given.num_calibration,
    )
    inputs = replace(inputs, ask_task=bool(given.levels) or given.max_drop is not None)
    records: list[LevelRecord] = []
    left_out: dict[str, str] = {}
    for level in _levels(given, spec):
        if given.levels and (reason := spec.lacks(params, inputs, level)):
            left_out[level] = reason
            continue
        records.append(_one_level(given, spec, params, inputs, aside, level))
        print(f"distft: {table.line(records[-1])}", file=sys.stderr, flush=True)
    if not records:
        named = "; ".join(f"{level}: {reason}" for level, reason in left_out.items())
        raise _mistake(f"--levels all: no level of {spec.name} can be written here ({named})", "see each reason")
    certificate.refuse_failed(records, source, spec.name)
    table.refuse_losses(records, given.max_drop)
    if source.run is not None:
        shutil.copyfile(source.run / "recipe.toml", aside / "recipe.toml")
    write_card(aside, source, spec, records)
    rows = inputs.rows()
    about = {"from": rows.origin, "sha256": rows.sha256, "prompts": len(rows.prompts)}
    about |= {"texts": len(rows.texts), "chats": len(rows.chats)}
    made = certificate.write(
        aside, format_name=spec.name, source=source, rows=about, levels=records, options=options_of(given)
    )
    take = table.advised(made["levels"])
    more = ({"left_out": left_out} if left_out else {}) | ({"take": take} if take else {})
    return made | more, source


def _levels(given: argparse.Namespace, spec: ExportFormatSpec) -> tuple[str, ...]:
    return spec.levels if given.levels else (given.level or spec.default_level,)


def make_inputs(
    source: ModelSource,
    workdir: Path,
    rows: Path | None,
    num_rows: int | None,
    *,
    calibration: str | None = None,
    num_calibration: int | None = None,
) -> FormatInputs:
    """Return what a format may use, each part made when it is first asked for."""
    from distft.export_formats import calibration as calibrations
    from distft.export_formats.proof_rows import proof_rows
    from distft.export_formats.reference import SourceReference
    from distft.export_formats.spec import FormatInputs
    from distft.export_formats.whole_model import whole_model

    reference = functools.cache(lambda: SourceReference(source))
    return FormatInputs(
        source=source,
        whole_model=functools.cache(lambda: whole_model(source, workdir)),
        reference=reference,
        rows=functools.cache(lambda: proof_rows(source, reference().tokenizer, rows, num_rows)),
        calibration=functools.cache(lambda: calibrations.calibration(source, calibration, num_calibration)),
    )


def _one_level(
    given: argparse.Namespace, spec: ExportFormatSpec, params: Any, inputs: FormatInputs, aside: Path, level: str
) -> LevelRecord:
    """Write and compare one level.

    Raises:
        MachineError: nothing here can run it, and `--unproven` was not given.
    """
    from distft.core.errors import MachineError
    from distft.export_formats.certificate import LevelRecord

    exported = spec.write(params, inputs, aside, level)
    proof = spec.prove(params, inputs, aside, level)
    if proof.unproven and not given.unproven:
        raise MachineError(
            f"{proof.unproven}  fix: pip install 'distft[export]', or write it all the same with --unproven"
        )
    num_bytes = sum((aside / name).stat().st_size for name in exported.files)
    return LevelRecord(level=level, exported=exported, proof=proof, num_bytes=num_bytes)


def _commands(certificate: dict[str, Any], out: Path) -> list[str]:
    return [command.replace("PATH", str(out)) for level in certificate["levels"] for command in level["commands"]]


def _shown(out: Path, certificate: dict[str, Any]) -> Iterator[str]:
    from distft.export_formats import table

    yield from table.lines(certificate)
    state = "compared with its source" if certificate["proven"] else "NOT compared: nothing here runs it"
    yield f"{out}: {certificate['format']}, {state}; certificate.json says how"
    yield from (f"  {command}" for command in _commands(certificate, out))
    if "pushed" in certificate:
        yield f"  pushed: {certificate['pushed']}"


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("distft export", [Problem(message=message, fix=fix)])
