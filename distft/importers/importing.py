"""A file goes in; which tool it is of is found out, and a recipe that can be loaded comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from distft.core.errors import Problem, RecipeError
from distft.core.nearest import nearest
from distft.importers.config_file import ConfigFile, read_config
from distft.importers.conversion import Conversion
from distft.importers.section import Reading
from distft.importers.spec import Imported, ImporterSpec, ImportOptions
from distft.recipe import Registries, parse_recipe
from distft.recipe.lines import KeyPath, find_lines
from distft.recipe.origin import shown

GENERATED = "the recipe made of it"


def import_config(
    path: Path,
    *,
    importers: Mapping[str, ImporterSpec],
    registries: Registries,
    tool: str | None = None,
    options: ImportOptions | None = None,
) -> Imported:
    """Make a recipe of a tool's file.

    Args:
        path: the file.
        importers: the tools that are known.
        registries: what a recipe may choose from.
        tool: name of the tool, when it is not to be found out.
        options: what the file does not say.

    Raises:
        RecipeError: the file cannot be read, is of no known tool or of several, asks for what is not here, or would
            become a recipe that is not valid; lists everything, with lines of the file.
    """
    registries.load_plugins()
    file = read_config(path)
    spec = _tool(file, importers, tool)
    work = Conversion(spec=spec, reading=Reading(file=file), registries=registries, options=options or ImportOptions())
    spec.convert(work)
    work.settle(work.top(), spec.keys[""] if spec.keys else {})
    for remarks in (work.left, work.unknown):
        remarks.sort(key=lambda remark: (remark.line is None, remark.line or 0))
    overridden, wrong = work.draft.override(work.options.overrides)
    problems = [*work.reading.problems, *wrong]
    problems += [
        problem
        for key, problem in work.required
        if not any(key[: len(override)] == override for override in overridden)
    ]
    if problems:
        raise RecipeError(str(path), problems)
    toml = work.draft.toml(_head(work), _tail(work))
    _refuse_invalid(work, toml, registries)
    comments = work.draft.comments.items()
    return Imported(
        tool=spec.name,
        toml=toml,
        changed={".".join(map(str, key)): tuple(texts) for key, texts in comments},
        left=tuple(work.left),
        unknown=tuple(work.unknown),
    )


def _tool(file: ConfigFile, importers: Mapping[str, ImporterSpec], tool: str | None) -> ImporterSpec:
    if tool is not None:
        if tool in importers:
            return importers[tool]
        near = nearest(tool, importers)
        hint = f"did you mean {near}?  " if near else ""
        message = f"--from {shown(tool)}  is no tool that is known here"
        raise RecipeError(str(file.path), [Problem(message=message, fix=f"{hint}known: {', '.join(importers)}")])
    matching = [spec for spec in importers.values() if spec.detects(file)]
    if len(matching) == 1:
        return matching[0]
    fix = "say which with --from; " + "; ".join(
        f"{spec.name}: {spec.told_by}" for spec in (matching or importers.values())
    )
    if matching:
        message = f"it may be of {' or of '.join(spec.title for spec in matching)}: it has keys of each"
    else:
        keys = shown(", ".join(map(str, file.content)) or "none")
        message = f"it is not clear of which tool the file is; its keys: {keys}"
    raise RecipeError(str(file.path), [Problem(message=message, fix=fix)])


def _refuse_invalid(work: Conversion, toml: str, registries: Registries) -> None:
    """Load what was made, and report what is wrong with it at the lines of the file it was made of."""
    # what stands for a path on this machine is nobody's business yet
    checked = replace(registries, resolve_paths=lambda recipe: recipe)
    try:
        parse_recipe(toml, source=GENERATED, registries=checked)
    except RecipeError as error:
        keys = {line: key for key, line in find_lines(toml).items()}
        problems = [_at_their_line(work, problem, keys) for problem in error.problems]
        raise RecipeError(str(work.reading.file.path), problems) from None


def _at_their_line(work: Conversion, problem: Problem, keys: Mapping[int, KeyPath]) -> Problem:
    key = keys.get(problem.line or 0, ())
    origin = next(
        (work.draft.origins[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in work.draft.origins), ()
    )
    text = f"{work.reading.written(origin)}  becomes {problem.message}" if origin else f"becomes {problem.message}"
    return Problem(message=text, fix=problem.fix, line=work.reading.file.line_of(origin))


def _head(work: Conversion) -> list[str]:
    name = shown(work.reading.file.path.name)
    return [
        f"Made by `distft import` of {name}, a file of {work.spec.title}.",
        "A comment above a key says what it was there, where that means something else here, or "
        "where the file is silent.",
    ]


def _tail(work: Conversion) -> list[str]:
    lines: list[str] = []
    if work.left:
        lines += ["Not carried over:", *(f"  {remark}" for remark in work.left)]
    if work.unknown:
        lines += ["Not known to this importer:", *(f"  {remark}" for remark in work.unknown)]
    return lines or ["Everything in the file was carried over."]
