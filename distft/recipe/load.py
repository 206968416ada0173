"""Reads a recipe: finds every mistake in it, or returns it resolved."""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params, Registry, nearest
from distft.recipe.eval_rules import SPOT_SETS
from distft.recipe.evaluation import AnswersTable, EvalTable
from distft.recipe.explain import did_you_mean, read_table
from distft.recipe.lines import KeyPath, find_lines
from distft.recipe.origin import Origin, RecipeMistake, shown
from distft.recipe.overrides import apply_overrides
from distft.recipe.removed_keys import is_what_happens
from distft.recipe.rollout import RewardTerm, RolloutTable
from distft.recipe.rules import broken_rules
from distft.recipe.schema import (
    DEFAULT_PARTS,
    Choice,
    ExportTable,
    Recipe,
    Registries,
    RunKeys,
    chosen_tables,
    fill_dependent_defaults,
    fixed_tables,
)
from distft.recipe.toml_text import is_array, is_table, toml_value
from distft.recipe.unknown import unknown_key, unknown_top

ParamsT = TypeVar("ParamsT", bound=Params)
_DEEPEST = 8
"""Tables and arrays inside each other; no recipe needs more than four."""


def load_recipe(path: str | Path, *, registries: Registries, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe in the file at `path`, changed by `overrides` (see `apply_overrides`).

    Raises:
        RecipeError: the file cannot be read, or lists every mistake in it and in the overrides.
    """
    source = str(path)
    try:
        content = Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise RecipeError(source, [Problem(message=f"cannot be read: {error}")]) from None
    if content is None:
        raise RecipeError(source, [_not_a_file(Path(path))])
    try:
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise RecipeError(source, [Problem(message=message, line=line, fix="save the file as UTF-8")]) from None
    return parse_recipe(text, source=source, registries=registries, overrides=overrides)


def parse_recipe(text: str, *, source: str, registries: Registries, overrides: Iterable[str] = ()) -> Recipe:
    """Parse the recipe written in `text`; `source` is what messages call it.

    Raises:
        RecipeError: lists every mistake in the text and in the overrides; or a plugin cannot be loaded.
    """
    registries.load_plugins()
    try:
        raw, lines = tomllib.loads(text), find_lines(text)
    except ValueError as error:
        raise RecipeError(source, [_not_toml(text, str(error))]) from None
    except RecursionError:
        raise RecipeError(source, [Problem(message="not a recipe: nested too deeply")]) from None
    overridden, problems = apply_overrides(raw, overrides)
    lines = {key: line for key, line in lines.items() if not any(key[: len(new)] == new for new in overridden)}
    origin = Origin(raw=raw, lines=lines, overrides=overridden)
    reader = _Reader(origin, registries)
    recipe = reader.recipe(source)
    problems += [origin.problem(fault) for fault in reader.faults]
    if problems:
        raise RecipeError(source, problems)
    return registries.resolve_paths(recipe)


class _Reader:
    """Collects faults on the way; what it returns is to be used only when there are none."""

    def __init__(self, origin: Origin, registries: Registries) -> None:
        self.origin = origin
        self.registries = registries
        self.faults = list(_unusable_values(origin.raw, ()))
        bad = {fault.key for fault in self.faults}
        gone = {
            (table, key)
            for table, keys in origin.raw.items()
            if is_table(keys)
            for key, value in keys.items()
            if is_what_happens(f"{table}.{key}", value)
        }
        self.raw: dict[str, Any] = _without(origin.raw, bad | gone, ())
        fill_dependent_defaults(self.raw)

    def recipe(self, source: str) -> Recipe:
        tables: dict[str, Any] = {table: self.fixed(table, kind) for table, kind in fixed_tables().items()}
        tables["eval"] = self.scored(tables["eval"])
        tables["export"] = self.exported(tables["export"])
        tables["rollout"] = self.rewarded(tables["rollout"])
        parts: dict[str, Any] = {table: self.chosen(table) for table in chosen_tables()}
        run = self.run_keys({*tables, *parts})
        recipe = Recipe(**run.model_dump(), **tables, **parts, source=source, origin=self.origin)
        faulty = [fault.key for fault in self.faults]
        self.faults += [fault for fault in broken_rules(recipe, self.registries) if not fault.touches(faulty)]
        return recipe

    def run_keys(self, tables: set[str]) -> RunKeys:
        top = {key: value for key, value in self.raw.items() if key not in tables}
        return self.read(RunKeys, top, ())

    def fixed(self, table: str, kind: type[ParamsT]) -> ParamsT:
        return self.read(kind, self.table(table), (table,))

    def scored(self, table: EvalTable) -> EvalTable:
        """Return the table with every score's settings checked and filled in."""
        sets: list[AnswersTable] = []
        for index, answers in enumerate(table.answers):
            raw_scores = answers.scores or SPOT_SETS.get(answers.path or "", ())
            scores = tuple(self.score(dict(raw), index, number) for number, raw in enumerate(raw_scores))
            sets.append(answers.model_copy(update={"scores": scores}))
        return table.model_copy(update={"answers": tuple(sets)})

    def score(self, raw: dict[str, Any], position: int, number: int) -> dict[str, Any]:
        return self.listed(self.registries.scores, raw, ("eval", "answers", position, "scores", number))

    def rewarded(self, table: RolloutTable) -> RolloutTable:
        """Return the table with the settings of every reward and of the generator checked and filled in."""
        rewards = tuple(self.reward(dict(raw), index) for index, raw in enumerate(table.rewards))
        generator = {"name": table.generator} if isinstance(table.generator, str) else table.generator
        if generator != RolloutTable().generator:  # the default has nothing to be filled in
            generator = self.listed(self.registries.generators, dict(generator), ("rollout", "generator"))
        return table.model_copy(update={"rewards": rewards, "generator": generator})

    def reward(self, raw: dict[str, Any], index: int) -> dict[str, Any]:
        """Return a score with its settings, its weight and the figure that is the reward."""
        where = ("rollout", "rewards", index)
        term = {key: raw.pop(key) for key in list(RewardTerm.model_fields) if key in raw}
        read = self.read(RewardTerm, term, where)
        return self.listed(self.registries.scores, raw, where) | read.model_dump(mode="json", exclude_none=True)

    def exported(self, table: ExportTable) -> ExportTable:
        """Return the table with every export's settings checked and filled in."""
        registry = self.registries.exports
        also = tuple(
            self.listed(registry, dict(raw), ("export", "also", index)) for index, raw in enumerate(table.also)
        )
        return table.model_copy(update={"also": also})

    def listed(self, registry: Registry[Any], raw: dict[str, Any], key_path: KeyPath) -> dict[str, Any]:
        """Return one entry of a list of parts, each a name and its settings, with its defaults filled in."""
        name = raw.pop("name", None)
        if not isinstance(name, str) or name not in registry:
            noun = registry.noun
            article = "an" if noun[0] in "aeiou" else "a"
            hint = did_you_mean(name, list(registry))
            message = f"{article} {noun} needs a name" if name is None else f"unknown {noun}{hint}"
            self.report(RecipeMistake(key=(*key_path, "name"), message=message, fix=f"allowed: {', '.join(registry)}"))
            return {"name": name, **raw}
        params = self.read(registry[name].params, raw, key_path, part=name)
        return {"name": name, **params.model_dump(mode="json", exclude_none=True)}

    def chosen(self, table: str) -> Choice[Any]:
        raw, registry = self.table(table), self.registries.part(table)
        name = raw.pop("name", DEFAULT_PARTS[table])
        if isinstance(name, str) and name in registry:
            spec = registry[name]
            params = self.read(spec.params.for_table(raw), raw, (table,), part=name)
        else:
            allowed = list(registry)
            message = f"unknown {registry.noun}{did_you_mean(name, allowed)}"
            self.report(RecipeMistake(key=(table, "name"), message=message, fix=f"allowed: {', '.join(allowed)}"))
            self.report_keys_of_no_part(table, raw)
            spec = next(iter(registry.values()))
            params = spec.params.model_construct()
        line = self.origin.lines.get((table, "name"), self.origin.lines.get((table,)))
        return Choice(name=str(name), params=params, spec=spec, line=line)

    def report_keys_of_no_part(self, table: str, raw: dict[str, Any]) -> None:
        allowed = sorted({key for spec in self.registries.part(table).values() for key in spec.params.model_fields})
        for key in raw:
            if key not in allowed:
                self.report(unknown_key((table, key), allowed, self.registries))

    def table(self, name: str) -> dict[str, Any]:
        """Return a copy of the raw table; an empty one when it is absent, or is no table at all."""
        raw = self.raw.get(name, {})
        if is_table(raw):
            return dict(raw)
        pair = f"name = {toml_value(raw)}" if name in chosen_tables() else "its keys"
        self.report(RecipeMistake(key=(name,), message="must be a table", fix=f"write [{name}] and below it {pair}"))
        return {}

    def read(self, kind: type[ParamsT], raw: dict[str, Any], key_path: KeyPath, part: str | None = None) -> ParamsT:
        def explain(key: KeyPath, allowed: list[str]) -> RecipeMistake:
            if len(key) == 1:
                return unknown_top(key, self.registries, is_table=isinstance(raw[str(key[0])], dict | list))
            return unknown_key(key, allowed, self.registries, part=part)

        table, faults = read_table(kind, raw, key_path, explain)
        for fault in faults:
            self.report(fault)
        return table

    def report(self, fault: RecipeMistake) -> None:
        """Keep the fault, unless its key was reported before: what follows from a removed value is no news."""
        if not fault.touches(reported.key for reported in self.faults):
            self.faults.append(fault)


def _unusable_values(value: object, key: KeyPath) -> Iterator[RecipeMistake]:
    """Yield the values that TOML can write and no setting can have."""
    inside = value.items() if is_table(value) else enumerate(value) if is_array(value) else ()
    if why := _unusable(value):
        yield RecipeMistake(key=key, message=why)
    elif inside and len(key) > _DEEPEST:
        yield RecipeMistake(key=key, message="is nested too deeply")
    else:
        for step, inner in inside:
            if why := _unusable(step):
                yield RecipeMistake(key=(*key, step), message=f"is a key that {why}")
            else:
                yield from _unusable_values(inner, (*key, step))


def _unusable(value: object) -> str:
    match value:
        case datetime.date() | datetime.time():
            return "is a date or time, which no setting is; text needs quotes"
        case float() if not math.isfinite(value):
            return "must be a finite number"
        case bool():
            return ""
        case int() if not -(2**63) <= value < 2**63:
            return "does not fit 64 bits"
        case str() if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            return "holds a character that is not text"
        case _:
            return ""


def _without(value: Any, bad: set[KeyPath], key_path: KeyPath) -> Any:
    """Return a copy without the values at the `bad` keys."""
    if is_table(value):
        return {
            step: _without(inner, bad, (*key_path, step))
            for step, inner in value.items()
            if (*key_path, step) not in bad
        }
    if is_array(value):
        return [
            _without(inner, bad, (*key_path, place))
            for place, inner in enumerate(value)
            if (*key_path, place) not in bad
        ]
    return value


def _not_a_file(path: Path) -> Problem:
    if path.is_dir():
        recipes = sorted(file.name for file in path.glob("*.toml"))
        return Problem(message="is a folder, not a recipe", fix=f"it holds: {', '.join(recipes)}" if recipes else "")
    if path.exists():
        return Problem(message="is not a regular file")
    beside = sorted(file.name for file in path.parent.glob("*.toml"))
    near = nearest(path.name, beside) or nearest(f"{path.name}.toml", beside)
    return Problem(message="no such file", fix=f"did you mean {path.parent / near}?" if near else "")


def _not_toml(text: str, complaint: str) -> Problem:
    """Explain an error of tomllib, with the line of text that it is about."""
    place = re.search(r" \(at line (\d+), column (\d+)\)$", complaint)
    what = complaint[: place.start()] if place else complaint.removesuffix(" (at end of document)")
    line = int(place[1]) if place else text.count("\n") + (not text.endswith("\n"))
    lines = text.splitlines()
    written = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    fix = "text needs quotes, and true and false are lower case" if what == "Invalid value" else ""
    what = what[:1].lower() + what[1:]
    return Problem(message=f"{shown(written)}  not valid TOML: {what}".strip(), line=max(line, 1), fix=fix)
