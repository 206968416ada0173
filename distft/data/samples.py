"""What a data format makes of one row, before any tokenizer sees it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from distft.core.registry import NoParams, Params

if TYPE_CHECKING:
    from distft.data.drafts import Drawn, RawText
    from distft.data.rendered import Rendered

Row: TypeAlias = dict[str, Any]
"""One row as its file holds it: column -> value."""
Message: TypeAlias = dict[str, Any]
"""`role` and `content` (str), and for an assistant that calls tools `tool_calls`, in the form chat templates read; what
it thought in `reasoning_content`; and `trained` (bool) where the row says whether the turn is trained."""


class RowError(Exception):
    """A row that cannot become a sample, in plain words; whoever read the row adds file and row number."""


class Drafter(Protocol):
    """Writes documents as a tokenizer's model reads them: `distft.data.render.Renderer`."""

    def draw_chat(self, chat: Conversation) -> list[Drawn]:
        """Return a chat as the texts of its rows: one, or more where the template rewrites earlier turns."""
        ...

    def raw_text(self, text: str, *, prompt: str | None = None) -> RawText:
        """Return raw text that begins with `prompt`, behind which it is trained; None: all of it is."""
        ...

    def ask_chat(self, chat: Conversation) -> tuple[str, list[int]]:
        """Return the chat without its last answer, as text and as tokens."""
        ...

    def ask_raw(self, prompt: str) -> tuple[str, list[int]]:
        """Return a raw prompt as text and as tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, special tokens too, for messages."""
        ...


class Sample(ABC):
    """What is trained of one row: a document, or a group of documents.

    A kind of sample says here all that is asked of it; whoever renders, compares or counts rows tests no kind.
    """

    documents: tuple[Document, ...]
    """In order; a document is its own only one."""

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from: no text but white space, or no completion."""

    @property
    @abstractmethod
    def question(self) -> str:
        """What a person reads as the question: all before the last answer but the system message; "" for none."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """What a person reads as the answer, with its tool calls."""

    @property
    def system(self) -> str:
        """System messages and tool definitions, which make the same question another one."""
        return ""

    @property
    def reference(self) -> str:
        """The right answer, with which a model's own is compared."""
        return self.answer

    @property
    def open_chat(self) -> Conversation | None:
        """The chat that is asked, without its last answer; None: raw text."""
        return None

    @abstractmethod
    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        """Return the sample without its last answer, as text and as the tokens that the answer follows in training.

        Raises:
            RowError: it asks nothing, or what it asks is empty or cannot be rendered.
            DataError: the chat template cannot be used.
        """

    @abstractmethod
    def join(self, rows: Sequence[list[Rendered]], drafter: Drafter) -> list[Rendered]:
        """Return the rows to train, from those of each document.

        Raises:
            RowError: these rows cannot be trained together.
        """


class Document(Sample):
    """One text with the tokens to train."""

    @property
    def documents(self) -> tuple[Document, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The document itself."""
        return (self,)

    @abstractmethod
    def write(self, drafter: Drafter) -> Sequence[Drawn | RawText]:
        """Return the texts of its rows.

        Raises:
            RowError: it cannot be rendered.
            DataError: the chat template cannot be used, or not for this document.
        """

    def join(self, rows: Sequence[list[Rendered]], drafter: Drafter) -> list[Rendered]:
        """Return the rows of the one document."""
        return rows[0]


@dataclass(frozen=True, kw_only=True)
class Conversation(Document):
    """A chat; rendered by the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Tool definitions, each `{"type": "function", "function": {...}}`; None when there are none."""
    num_prompt: int = 0
    """Leading messages that are given (a prompt/completion row): trained only under `loss_on = "all"`."""

    @property
    def is_empty(self) -> bool:
        """False: its template tells, see `Rendered.empty`."""
        return False

    @property
    def question(self) -> str:
        """All messages but the last and the system's, a line each."""
        return "\n".join(_said(message) for message in self.messages[:-1] if message["role"] != "system")

    @property
    def answer(self) -> str:
        """The last message with its tool calls."""
        return _said(self.messages[-1])

    @property
    def system(self) -> str:
        """System messages and tool definitions."""
        tools = json.dumps(self.tools, ensure_ascii=False) if self.tools else ""
        return "\n".join(_said(message) for message in self.messages if message["role"] == "system") + tools

    @property
    def reference(self) -> str:
        """What the assistant says last, or the functions that it calls where it says nothing."""
        last = self.messages[-1]
        return last["content"] or json.dumps([call["function"] for call in last.get("tool_calls", ())])

    @property
    def open_chat(self) -> Conversation:
        """The chat without its last answer."""
        answered = self.messages[-1]["role"] == "assistant"
        return replace(self, messages=self.messages[:-1] if answered else self.messages)

    def write(self, drafter: Drafter) -> Sequence[Drawn]:
        """Return what the chat template writes."""
        return drafter.draw_chat(self)

    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        """Return the chat without its last answer."""
        return drafter.ask_chat(self)


@dataclass(frozen=True, kw_only=True)
class PromptCompletion(Document):
    """Raw text: both parts tokenised jointly, end-of-sequence appended, no chat template."""

    prompt: str
    completion: str

    @property
    def is_empty(self) -> bool:
        """Whether the completion is white space."""
        return not self.completion.strip()

    @property
    def question(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def answer(self) -> str:
        """The completion."""
        return self.completion

    def write(self, drafter: Drafter) -> Sequence[RawText]:
        """Return both parts as one text."""
        return [drafter.raw_text(self.prompt + self.completion, prompt=self.prompt)]

    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        """Return the prompt alone, as at inference.

        Where its last token would merge with the completion's first (`Rendered.diverged`), training saw that one token
        instead.
        """
        return drafter.ask_raw(self.prompt)


@dataclass(frozen=True, kw_only=True)
class Text(Document):
    """One document; every token is trained, end-of-sequence appended."""

    text: str

    @property
    def is_empty(self) -> bool:
        """Whether the text is white space."""
        return not self.text.strip()

    @property
    def question(self) -> str:
        """None."""
        return ""

    @property
    def answer(self) -> str:
        """The text."""
        return self.text

    def write(self, drafter: Drafter) -> Sequence[RawText]:
        """Return the text."""
        return [drafter.raw_text(self.text)]

    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        """Refuse: it asks nothing."""
        raise RowError("plain text asks nothing: only its loss can be measured")


@dataclass(frozen=True, kw_only=True)
class Group(Sample):
    """Documents of one row that are trained together and stay in one micro-batch: a chosen and a rejected answer."""

    documents: tuple[Document, ...]
    values: tuple[float, ...] = ()
    """What the row says of the group: one number for each name in `FormatSpec.values`."""
    same_prompt: bool = False
    """Its documents are answers to one prompt: up to where they are trained they must be the same tokens."""

    @property
    def is_empty(self) -> bool:
        """Whether one of its documents is."""
        return any(document.is_empty for document in self.documents)

    @property
    def question(self) -> str:
        """The first document's."""
        return self.documents[0].question

    @property
    def answer(self) -> str:
        """All answers, one after another."""
        return "\n".join(document.answer for document in self.documents)

    @property
    def system(self) -> str:
        """The first document's."""
        return self.documents[0].system

    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        """Refuse: it has several answers."""
        raise RowError("a row of several documents asks nothing: only its loss can be measured")

    def join(self, rows: Sequence[list[Rendered]], drafter: Drafter) -> list[Rendered]:
        """Return the one row of all documents."""
        from distft.data.rendered import Rendered, differing_prompts

        for many in rows:
            if len(many) != 1:
                raise RowError(
                    f"its chat becomes {len(many)} rows, one for each trained turn, and a group is trained as a whole  "
                    'set [data] loss_on = "last_turn"'
                )
        documents = [document for many in rows for document in many]
        if self.same_prompt and (why := differing_prompts(documents, drafter.decode)):
            raise RowError(why)
        return [Rendered.group(documents, self.values)]


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (f"\n{json.dumps(calls, ensure_ascii=False)}" if calls else "")


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
    answered: bool = True
    """False: its rows hold no answer, so only objectives whose model writes them take them."""
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
