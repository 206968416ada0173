"""What rules decide by, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from distft.model.adapters import MethodSpec

Goal: TypeAlias = Literal["format", "style", "task", "skill", "facts", "domain", "preference", "reward"]
RowsHold: TypeAlias = Literal["answers", "pairs", "labels", "prompts"]
AdvisedMethod: TypeAlias = Literal["full", "lora", "qlora"]
"""A method that rules speak of."""
ADVISED: tuple[AdvisedMethod, ...] = get_args(AdvisedMethod)
GOALS: dict[str, str] = {
    "format": "answers in a fixed form: JSON, fields, a template",
    "style": "a tone or a voice",
    "task": "one task with right answers: extract, classify, call tools, triage",
    "skill": "something hard it does badly: mathematics, code, long chains of steps",
    "facts": "facts that it does not know: documents, products, what changed last week",
    "domain": "a whole field or language, from much plain text",
    "preference": "what people prefer: which of two right answers is the better one",
    "reward": "a number for any answer, as a signal for reinforcement learning or best-of-n",
}
SoFar: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the rules decide by."""

    goal: Goal
    rows: int
    """Training rows."""
    parameters: float | None = None
    """Parameters of the model; None: not known here."""
    world: int = 1
    """GPUs in all."""
    longest_chars: int | None = None
    """Characters of the longest training row, a pair's prompt counted with both answers; None: not examined."""
    typical_chars: int | None = None
    """Characters of the median training row."""
    rows_hold: RowsHold = "answers"
    """Right answers, pairs of a chosen and a rejected one, single answers labelled as good or bad, or prompts alone,
    whose answers a grader judges."""
    pretrained: bool = False
    """The model has had no supervised fine-tuning."""
    method: AdvisedMethod | None = None
    """A method that was chosen already; None: it is advised."""
    longer: float | None = None
    """Share of pairs whose chosen answer has more characters; None: not examined."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One piece of advice."""

    name: str
    """As in docs/choosing.md and in the comments of a written recipe."""
    decides: str
    says: str
    why: str
    source: str
    when: Callable[[Situation, SoFar], bool]
    gives: Callable[[Situation, SoFar], Any]


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A rule that applied, and what it gave."""

    rule: Rule
    value: Any


def always(situation: Situation, so_far: SoFar) -> bool:
    """Return True: the rule for all that no other one takes."""
    return True


def gives(value: Any) -> Callable[[Situation, SoFar], Any]:
    """Return a function that gives this value in every situation."""
    return lambda situation, so_far: value


def method_spec(name: str) -> MethodSpec:
    """Return what a method declares about itself."""
    from distft.model.adapters import METHODS  # not for the help of the command, which lists the goals

    return METHODS[name]


def is_adapter(so_far: SoFar) -> bool:
    """Return whether the method that was decided trains an adapter."""
    return method_spec(so_far["method"]).adapter


def fewer_than(rows: int) -> Callable[[Situation, SoFar], bool]:
    """Return a condition that holds below so many training rows."""
    return lambda situation, so_far: situation.rows < rows
