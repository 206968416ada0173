"""`grader`: what an answer is worth by a grader of OpenAI's fine-tuning API that needs no model and runs no code.

Kinds: `string_check`, `text_similarity` (rouge) and `multi`, a formula of several. Their texts are templates:
`{{item.KEY}}` is a column of the row, `{{sample.output_text}}` the answer, `{{sample.output_json.KEY}}` a part of it.
Source: OpenAI's API reference, Graders (openapi 2.3.0).
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter, model_validator

from distft.core.errors import DataError
from distft.core.registry import Params
from distft.scores import rouge
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreResult, ScoreSpec, mean

Text = Annotated[str, StringConstraints(max_length=100_000)]
GraderName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
FormulaName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w{0,63}$")]
SimilarityMetric = Literal[
    "cosine", "fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
]
ROUGE_KINDS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Metrics that are computed here -> what rouge-score calls them."""
UNSERVED = {
    "python": "runs code of users, which nothing here does for a job; a recipe of your own may name the score function",
    "score_model": "asks a model for a score, and no model is configured to judge",
    "label_model": "asks a model for a label, and no model is configured to judge",
}
"""Kinds that are refused, and why."""
FIGURE = "grade"
_PLACE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}  # of several values, also of one alone
_LONGEST_FORMULA = 1000


class UnservedGraderError(ValueError):
    """A grader of OpenAI's that is not computed here."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        """What of the grader says so."""
        super().__init__(message)


class FormulaError(ValueError):
    """A `calculate_output` that is no formula of the graders' scores."""


class PlaceError(DataError):
    """A template names what the row or the answer does not have."""

    def __init__(self, place: str) -> None:
        self.of_answer = place.startswith("sample")
        """Whether it is the answer that has not what is named, and not the row."""
        super().__init__(f"the grader names {{{{{place}}}}}, which is not there")


class StringCheckGrader(Params):
    """1 where a comparison of two texts holds, else 0."""

    type: Literal["string_check"]
    name: GraderName
    input: Text
    reference: Text
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarityGrader(Params):
    """How alike two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    name: GraderName
    input: Text
    reference: Text
    evaluation_metric: SimilarityMetric

    @model_validator(mode="after")
    def _is_computed(self) -> Self:
        if self.evaluation_metric not in ROUGE_KINDS:
            message = f"evaluation_metric {self.evaluation_metric} is not computed here: {', '.join(ROUGE_KINDS)} are"
            raise UnservedGraderError("evaluation_metric", message)
        return self


def _refuse_unserved(content: Any) -> Any:
    if isinstance(content, Mapping) and isinstance(kind := content.get("type"), str) and kind in UNSERVED:
        raise UnservedGraderError("type", f"a grader {kind} {UNSERVED[kind]}")
    return content


SingleGrader = Annotated[
    StringCheckGrader | TextSimilarityGrader, Field(discriminator="type"), BeforeValidator(_refuse_unserved)
]


class MultiGrader(Params):
    """A formula of several graders' scores."""

    type: Literal["multi"]
    name: GraderName
    graders: Annotated[dict[FormulaName, SingleGrader], Field(min_length=1, max_length=20)]
    calculate_output: Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_FORMULA)]

    @model_validator(mode="after")
    def _is_a_formula(self) -> Self:
        formula_value(self.calculate_output, dict.fromkeys(self.graders, 1.0))
        return self


Grader = Annotated[
    StringCheckGrader | TextSimilarityGrader | MultiGrader,
    Field(discriminator="type"),
    BeforeValidator(_refuse_unserved),
]
GRADER: TypeAdapter[StringCheckGrader | TextSimilarityGrader | MultiGrader] = TypeAdapter(Grader)
"""Reads one: raises ValidationError, with an `UnservedGraderError` or a `FormulaError` inside where it is one."""


class GraderParams(Params):
    """The grader as OpenAI's API has it."""

    grader: Grader = Field(
        examples=[{"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}",
                   "reference": "{{item.answer}}"}]
    )  # fmt: skip
    """A table with `type` (string_check, text_similarity or multi), `name`, and the keys of that type."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What an answer is worth."""

    reward: float
    """NaN: it cannot be said, see `why`."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of each single grader, by its name in the formula or its own."""
    why: str = ""


class GraderComputation:
    """A grader with the libraries that it needs."""

    def __init__(self, grader: StringCheckGrader | TextSimilarityGrader | MultiGrader) -> None:
        """Prepare it.

        Raises:
            MachineError: rouge-score is not installed, and it is needed.
        """
        self.grader = grader
        self._singles = singles(grader)
        kinds = {single.evaluation_metric for single in self._singles.values() if single.type == "text_similarity"}
        self._similarity = {
            kind: rouge.build(rouge.RougeParams.model_validate({"kinds": (ROUGE_KINDS[kind],), "reference": "right"}))
            for kind in kinds
        }

    def grade(self, item: Mapping[str, Any], text: str) -> Grade:
        """Return what an answer is worth.

        Args:
            item: the row.
            text: the answer.

        Raises:
            PlaceError: the grader names what row or answer does not have.
        """
        scores = {name: self._score(single, item, text) for name, single in self._singles.items()}
        if not isinstance(self.grader, MultiGrader):
            return Grade(reward=scores[self.grader.name], scores=scores)
        value = formula_value(self.grader.calculate_output, scores)
        if value is None:
            shown = ", ".join(f"{name} = {score:g}" for name, score in scores.items())
            return Grade(reward=math.nan, scores=scores, why=f"calculate_output is no number where {shown}")
        return Grade(reward=value, scores=scores)

    def _score(self, grader: StringCheckGrader | TextSimilarityGrader, item: Mapping[str, Any], text: str) -> float:
        given, wanted = (fill_template(template, item, text) for template in (grader.input, grader.reference))
        if isinstance(grader, TextSimilarityGrader):
            result = self._similarity[grader.evaluation_metric](
                [Answer(id="sample", row={"right": wanted}, reference="", text=given)]
            )
            return float(result.totals[ROUGE_KINDS[grader.evaluation_metric]])
        match grader.operation:
            case "eq":
                return float(given == wanted)
            case "ne":
                return float(given != wanted)
            case "like":
                return float(wanted in given)
            case "ilike":
                return float(wanted.lower() in given.lower())


def singles(
    grader: StringCheckGrader | TextSimilarityGrader | MultiGrader,
) -> dict[str, StringCheckGrader | TextSimilarityGrader]:
    """Return the graders that give scores, by their names in the formula."""
    return grader.graders if isinstance(grader, MultiGrader) else {grader.name: grader}


def places(grader: StringCheckGrader | TextSimilarityGrader | MultiGrader) -> Iterator[str]:
    """Yield what a grader's templates name: `item.answer`, `sample.output_text`."""
    for single in singles(grader).values():
        for template in (single.input, single.reference):
            yield from (match[1] for match in _PLACE.finditer(template))


def fill_template(template: str, item: Mapping[str, Any], text: str) -> str:
    """Return a template with what it names in place; what is no text is written as JSON.

    Raises:
        PlaceError: it names what is not there.
    """
    sample: dict[str, Any] = {"output_text": text}
    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON: a template that wants some finds none
        sample["output_json"] = json.loads(text)
    known = {"item": item, "sample": sample}

    def value(match: re.Match[str]) -> str:
        inner = value_at(known, match[1])
        return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)

    return _PLACE.sub(value, template)


def value_at(known: Mapping[str, Any], place: str) -> Any:
    """Return what is at `item.a.b`.

    Raises:
        PlaceError: nothing is.
    """
    inner: Any = known
    for step in place.split("."):
        if not isinstance(inner, Mapping) or step not in inner:
            raise PlaceError(place)
        inner = inner[step]
    return inner


def formula_value(text: str, scores: Mapping[str, float]) -> float | None:
    """Return the value of a formula; None where it is no number for these scores.

    Raises:
        FormulaError: it is no formula of them.
    """
    try:
        value = _value(_formula(text), scores)
    except (ZeroDivisionError, OverflowError):
        return None
    except RecursionError:
        raise FormulaError("calculate_output is nested too deeply") from None
    return value if math.isfinite(value) else None


def _formula(text: str) -> ast.AST:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormulaError("calculate_output is no formula") from None


def _value(node: ast.AST, scores: Mapping[str, float]) -> float:
    """Return the value of a formula of numbers, names, + - * /, min, max and abs; nothing else is evaluated."""
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in scores:
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, scores))
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return abs(_value(argument, scores))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name]([_value(argument, scores) for argument in arguments])
        case _:
            pass
    raise FormulaError(f"calculate_output knows numbers, + - * / and {', '.join([*scores, *_FUNCTIONS, 'abs'])}")


def figures(params: GraderParams) -> tuple[MetricInfo, ...]:
    """Return the grade, and one figure for each grader of a formula."""
    inner = tuple(params.grader.graders.items()) if isinstance(params.grader, MultiGrader) else ()
    return (
        MetricInfo(name=FIGURE, binary=params.grader.type == "string_check"),
        *(MetricInfo(name=f"{FIGURE}_{name}", binary=single.type == "string_check") for name, single in inner),
    )


def build(params: GraderParams) -> Scorer:
    """Build the scorer; an answer that cannot be graded has no score, and its reason.

    Raises:
        MachineError: rouge-score is not installed, and it is needed.
    """
    computation, promised = GraderComputation(params.grader), figures(params)

    def graded(answers: Sequence[Answer]) -> ScoreResult:
        lines: list[list[float]] = []
        unscored: dict[str, str] = {}
        for answer in answers:
            try:
                grade = computation.grade(answer.row, answer.text)
            except PlaceError as error:
                if not error.of_answer:
                    raise DataError(f"{answer.id}: {error}") from None
                grade = Grade(reward=math.nan, why=str(error))
            if grade.why:
                unscored[answer.id] = grade.why
                lines.append([math.nan] * len(promised))
            else:
                inner = grade.scores.values() if len(promised) > 1 else ()
                lines.append([grade.reward, *inner])
        rows = {figure.name: tuple(line[place] for line in lines) for place, figure in enumerate(promised)}
        totals = {name: mean(values) for name, values in rows.items()}
        return ScoreResult(figures=promised, rows=rows, totals=totals, unscored=unscored)

    return graded


SPEC = ScoreSpec(name="grader", params=GraderParams, figures=figures, build=build)
