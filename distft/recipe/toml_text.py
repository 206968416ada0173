"""TOML values as text: whole recipes for files, single values for messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def is_table(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a TOML value is a table."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Return whether a TOML value is an array."""
    return isinstance(value, list)


def toml_text(content: Mapping[str, Any]) -> str:
    """Return `content` as a TOML document: plain keys, then one section per table, deeper tables inline."""
    plain = {key: value for key, value in content.items() if not is_table(value)}
    sections = [_pairs(plain)]
    for table, values in content.items():
        if is_table(values):
            sections += _sections(toml_key(table), values)
    return "\n\n".join(section for section in sections if section) + "\n"


def toml_key(key: str) -> str:
    """Return a key as TOML writes it, quoted where needed."""
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def toml_value(value: object) -> str:
    """Return a value as TOML writes it on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if is_table(value):
        pairs = [f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if is_array(value):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)  # numbers, and dates in messages: Python's text of them is TOML's


def _sections(header: str, table: Mapping[str, Any]) -> list[str]:
    arrays = {key: value for key, value in table.items() if _is_array_of_tables(value)}
    plain = {key: value for key, value in table.items() if key not in arrays}
    sections = [f"[{header}]\n{_pairs(plain)}".rstrip()]
    for key, rows in arrays.items():
        sections += [f"[[{header}.{toml_key(key)}]]\n{_pairs(row)}" for row in rows]
    return sections


def _is_array_of_tables(value: object) -> bool:
    return is_array(value) and bool(value) and all(map(is_table, value))


def _pairs(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{toml_key(key)} = {toml_value(value)}" for key, value in values.items())


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
