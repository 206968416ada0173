"""Reads one raw table into its class, and says in plain words what is wrong with it: value, allowed, nearest, fix."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from distft.core.registry import Params, nearest
from distft.recipe.lines import KeyPath
from distft.recipe.origin import RecipeMistake
from distft.recipe.schema_text import Schema, allowed_words, in_words, node_at
from distft.recipe.toml_text import is_array, is_table, toml_key, toml_value

ParamsT = TypeVar("ParamsT", bound=Params)
ExplainUnknown = Callable[[KeyPath, list[str]], RecipeMistake]
"""Explains a key nobody knows, given the keys that are known beside it."""


def read_table(
    kind: type[ParamsT], raw: dict[str, Any], prefix: KeyPath, explain_unknown: ExplainUnknown
) -> tuple[ParamsT, list[RecipeMistake]]:
    """Read `raw` as a `kind`; return the table and its mistakes.

    With faults, the table holds defaults where they are, so that rules between tables can still look at the rest.
    """
    try:
        return _validated(kind, raw), []
    except ValidationError as error:
        wrong = dict(_by_key(error, raw))
    schema = kind.model_json_schema()
    faults = [
        explain_unknown((*prefix, *key), list(node_at(schema, key[:-1]).get("properties", {})))
        if detail["type"] == "extra_forbidden"
        else _fault(key, detail, schema, raw, prefix)
        for key, detail in wrong.items()
    ]
    try:
        return _validated(kind, _repaired(raw, wrong, schema)), faults
    except ValidationError:  # a part's own check over several keys has failed: nothing to keep
        return kind.model_construct(), faults


def did_you_mean(word: object, allowed: list[str]) -> str:
    """Return `, did you mean "x"?`, or nothing when no allowed word is near."""
    match = nearest(word.lower(), allowed) if isinstance(word, str) else ""
    return f", did you mean {toml_value(match)}?" if match else ""


def _validated(kind: type[ParamsT], raw: dict[str, Any]) -> ParamsT:
    return kind.model_validate_json(json.dumps(raw))  # as JSON: there, strict still takes a list for a tuple


def _by_key(error: ValidationError, raw: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield one pydantic error per key: of the errors of a union's members the outermost stands for all."""
    details = [dict(detail) for detail in error.errors(include_url=False) if not _is_echo(detail, raw)]
    by_key = {_key(detail, raw): detail for detail in reversed(details)}
    for key in reversed(by_key):
        if not any(key[:depth] in by_key for depth in range(1, len(key))):
            yield key, by_key[key]


def _is_echo(detail: Any, raw: dict[str, Any]) -> bool:
    """Return whether an error only follows another: pydantic calls an array too short when elements of it are wrong."""
    return detail["type"] == "too_short" and len(_value(raw, _key(detail, raw))) >= detail["ctx"]["min_length"]


def _key(detail: Any, raw: dict[str, Any]) -> KeyPath:
    """Return an error's key: its location without pydantic's union tags and without elements of plain lists."""
    key: KeyPath = ()
    value: Any = raw
    for step in detail["loc"]:
        inner: Any = None
        if is_table(value):
            inner = value.get(step)
        elif is_array(value) and isinstance(step, int) and step < len(value) and is_table(value[step]):
            inner = value[step]
        if inner is not None:  # TOML has no null
            key, value = (*key, step), inner
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        return (*key, detail["loc"][-1])
    while key and isinstance(key[-1], int):  # an element is wrong as a whole: the array is what to look at
        key = key[:-1]
    return key


def _fault(key: KeyPath, detail: dict[str, Any], schema: Schema, raw: dict[str, Any], prefix: KeyPath) -> RecipeMistake:
    node = node_at(schema, key)
    if detail["type"] == "missing" and key[-1] not in _value(raw, key[:-1]):  # else elements of an array are missing
        return RecipeMistake(key=(*prefix, *key), message="is required", fix=_example((*prefix, *key), node))
    if detail["type"] in ("value_error", "assertion_error"):
        reason = str(detail["ctx"]["error"])
        named = [name for name in raw if name in re.findall(r"\w+", reason)] if not key else []
        return RecipeMistake(key=(*prefix, *key, *named[:1]), message=reason)
    value = _value(raw, key)
    expected = in_words(schema, node)
    message = f"must be {expected}{did_you_mean(value, allowed_words(schema, node))}"
    return RecipeMistake(key=(*prefix, *key), message=message, fix=_rewritten(value, expected))


def _example(key: KeyPath, node: Schema) -> str:
    about = str(node.get("description", ""))
    if "examples" not in node:
        return about
    example = node["examples"][0]
    if is_array(example):
        header, pairs = ".".join(map(str, key)), example[0].items()
        text = f"[[{header}]] " + " ".join(f"{name} = {toml_value(value)}" for name, value in pairs)
    else:
        text = f"{toml_key(str(key[-1]))} = {toml_value(example)}"
    return f"{about}  for example: {text}"


def _rewritten(value: object, expected: str) -> str:
    """Return the value as it was probably meant, when only its notation is wrong."""
    wants_number, wants_text = "number" in expected, expected.startswith("text")
    match value:
        case str():
            bare = value.strip().lower()
            is_number = wants_number and isinstance(_parsed(bare), int | float)
            is_bool = "true or false" in expected and bare in ("true", "false")
            return f"without quotes: {bare}" if is_number or is_bool else ""
        case float() if "whole number" in expected and value.is_integer():
            return f"write {int(value)}"
        case int() | float() if wants_text:
            return f'in quotes: "{toml_value(value)}"'
        case _:
            return ""


def _parsed(text: str) -> object:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return None


def _repaired(raw: dict[str, Any], wrong: dict[KeyPath, Any], schema: Schema) -> dict[str, Any]:
    """Return a copy without the wrong keys, and with an example of those that must be there."""
    repaired = copy.deepcopy(raw)
    for key in wrong:
        if not key:
            continue
        table = _value(repaired, key[:-1])
        table.pop(key[-1], None)
        if key[-1] in node_at(schema, key[:-1]).get("required", ()) and (
            examples := node_at(schema, key).get("examples")
        ):
            table[key[-1]] = examples[0]
    return repaired


def _value(raw: Any, key: KeyPath) -> Any:
    for step in key:
        raw = raw[step]
    return raw
