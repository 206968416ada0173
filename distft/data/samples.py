"""What a data format makes of one row, before any tokenizer sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from distft.core.registry import NoParams, Params

Row: TypeAlias = dict[str, Any]
"""One row as its file holds it: column -> value."""
Message: TypeAlias = dict[str, Any]
"""`role` and `content` (str), and for an assistant that calls tools `tool_calls`, in the form chat templates read; what
it thought in `reasoning_content`; and `trained` (bool) where the row says whether the turn is trained."""


class RowError(Exception):
    """A row that cannot become a sample, in plain words; whoever read the row adds file and row number."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A chat; rendered by the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Tool definitions, each `{"type": "function", "function": {...}}`; None when there are none."""
    num_prompt: int = 0
    """Leading messages that are given (a prompt/completion row): trained only under `loss_on = "all"`."""


@dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """Raw text: both parts tokenised jointly, end-of-sequence appended, no chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """One document; every token is trained, end-of-sequence appended."""

    text: str


Document: TypeAlias = Conversation | PromptCompletion | Text


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents of one row that are trained together and stay in one micro-batch: a chosen and a rejected answer."""

    documents: tuple[Document, ...]
    values: tuple[float, ...] = ()
    """What the row says of the group: one number for each name in `FormatSpec.values`."""
    same_prompt: bool = False
    """Its documents are answers to one prompt: up to where they are trained they must be the same tokens."""


Sample: TypeAlias = Document | Group


def documents_of(sample: Sample) -> tuple[Document, ...]:
    """Return the sample's documents, in order."""
    return sample.documents if isinstance(sample, Group) else (sample,)


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """A registered data format: one file in `formats/`."""

    name: str
    needs: str
    """The columns it reads, for messages: `"messages": a list of {role, content}`."""
    matches: Callable[[Row], bool]
    """Whether the row's columns are this format's; looks at names and outer types only, so that a broken row of the
    format still matches and gets its own message."""
    convert: Callable[[Row], Sample]
    """Row -> sample. Raises RowError."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """A small valid row: documentation, and what the contract tests start from."""
    params: type[Params] = NoParams
    reads: tuple[str, ...] | None = None
    """Every column that `convert` looks at: others are refused where they would change what the row means. None: not
    known, nothing is refused."""
    group_size: int = 1
    """Documents of each row; more than 1: `convert` gives a `Group` of so many."""
    values: tuple[str, ...] = ()
    """Names of the numbers of each row (`Group.values`): columns of its batches, such as "margin_G"."""
    decisive: tuple[str, ...] = ()
    """Those of `values` without which a row must not be trained, such as whether its answer is a good one."""


def text_column(row: Row, name: str, *, default: str | None = None) -> str:
    """Return the string in column `name`.

    Raises:
        RowError: it is missing (and there is no default), or not a string.
    """
    value = row.get(name)
    if value is None:
        if default is None:
            raise RowError(f'"{name}" is null' if name in row else f'missing "{name}"; the row has {columns_of(row)}')
        return default
    if not isinstance(value, str):
        raise RowError(f'"{name}" is {kind_of(value)}, expected a string')
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parse the object of a JSON text.

    Raises:
        ValueError: it has a key twice, of which Python's reader would drop the first without a word.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {json.dumps(next(key for key in keys if keys.count(key) > 1))} twice")
    return made


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON, and refuses objects with a key twice."""


def parse_json(text: str) -> Any:
    """Parse the value of a JSON text.

    Raises:
        ValueError: it is none (JSONDecodeError), an object has a key twice, or it is nested too deeply or holds a
            number too long for Python.
    """
    try:
        return JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def columns_of(row: Mapping[str, Any]) -> str:
    """Return the row's column names, quoted, for messages."""
    return ", ".join(f'"{name}"' for name in row) or "no columns"


def kind_of(value: object) -> str:
    """Return a value's type in words a user of JSON knows."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")
