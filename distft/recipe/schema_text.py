"""Describes a JSON Schema node in plain words, for messages that say what a key allows."""

from __future__ import annotations

import re
from typing import Any

from distft.recipe.lines import KeyPath
from distft.recipe.toml_text import toml_value

Schema = dict[str, Any]


def in_words(schema: Schema, node: Schema) -> str:
    """Return what a JSON Schema node allows, as `must be ...` goes on."""
    node = _resolved(schema, node)
    choices = [choice for choice in node.get("anyOf", [node]) if choice.get("type") != "null"]
    if len(choices) > 1:
        return " or ".join(in_words(schema, choice) for choice in choices)
    node = _resolved(schema, choices[0])
    if "const" in node:
        return toml_value(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(toml_value, node["enum"]))
    match node.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _range(node)
        case "number":
            return "a number" + _range(node)
        case "string":
            pattern = f" that matches {node['pattern']}" if "pattern" in node else ""
            return "text" + (pattern or (" that is not empty" if node.get("minLength") else ""))
        case "array":
            return _array_in_words(schema, node)
        case _:
            return "a table"


def allowed_words(schema: Schema, node: Schema) -> list[str]:
    """Return the fixed words among what a node allows."""
    node = _resolved(schema, node)
    if "anyOf" in node:
        return [word for choice in node["anyOf"] for word in allowed_words(schema, choice)]
    words = node.get("enum", [node["const"]] if "const" in node else [])
    return [word for word in words if isinstance(word, str)]


def node_at(schema: Schema, key: KeyPath) -> Schema:
    """Return the schema of the value at `key`; an empty one where the class allows anything."""
    node: Schema = schema
    for step in key:
        node = _resolved(schema, node)
        branches: list[Schema] = [_resolved(schema, choice) for choice in node.get("anyOf", [node])]
        if isinstance(step, int):
            children = [branch["items"] for branch in branches if "items" in branch]
        else:
            children = [branch["properties"][step] for branch in branches if step in branch.get("properties", ())]
            children += [branch["additionalProperties"] for branch in branches if branch.get("additionalProperties")]
        node = children[0] if children else {}
    return {**_resolved(schema, node), **node}


def _resolved(schema: Schema, node: Schema) -> Schema:
    return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def _range(node: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_short(node[name])}" for name, sign in signs.items() if name in node]
    limits += [f"divisible by {_short(node['multipleOf'])}"] if "multipleOf" in node else []
    return " " + " and ".join(limits) if limits else ""


def _short(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _array_in_words(schema: Schema, node: Schema) -> str:
    if "prefixItems" in node:
        items = [in_words(schema, item) for item in node["prefixItems"]]
        alike = len(set(items)) == 1
        return f"a list of {len(items)} {_plural(items[0])}" if alike else f"a list of {', '.join(items)}"
    of = f" of {_plural(in_words(schema, node['items']))}" if "items" in node else ""
    return "a list" + of + (" that is not empty" if node.get("minItems") else "")


def _plural(words: str) -> str:
    for singular, plural in {"a whole number": "whole numbers", "a number": "numbers", "a table": "tables"}.items():
        words = re.sub(rf"^{singular}\b", plural, words)
    return words
