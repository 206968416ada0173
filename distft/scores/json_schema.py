"""`json_schema`: the answer is JSON, and JSON that a schema allows (jsonschema library)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from distft.core.errors import MachineError, Problem, RecipeError
from distft.core.registry import Params
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreSpec, by_row

FIGURES = (MetricInfo(name="conforms", binary=True), MetricInfo(name="valid_json", binary=True))
_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\n(.*?)\n?```\s*\Z", re.DOTALL)


class JsonSchemaParams(Params):
    """The schema in a file, or here."""

    file: str | None = Field(default=None, min_length=1)
    """JSON Schema file; its `$schema` says which draft, 2020-12 unless it does."""
    inline: dict[str, Any] | None = None
    """JSON Schema written into the recipe."""
    allow_fence: bool = False
    """A Markdown code fence around the whole answer does not count."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.file is None) == (self.inline is None):
            raise ValueError("needs either file or inline")
        return self


def build(params: JsonSchemaParams) -> Scorer:
    """Build a scorer that validates each answer.

    Raises:
        MachineError: jsonschema is not installed.
        RecipeError: the schema cannot be read, or is none.
    """
    try:
        import jsonschema
        import jsonschema.validators
    except ImportError:
        raise MachineError('score "json_schema" needs jsonschema: pip install "distft[eval]"') from None
    schema = _read(params)
    checker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        checker.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise _wrong(params, f"is not a JSON Schema: {error.message}") from None
    validator = checker(schema)

    def judge(answer: Answer) -> tuple[bool, bool]:
        text = answer.text
        if params.allow_fence and (inside := _FENCE.match(text)):
            text = inside.group(1)
        try:
            value = json.loads(text, parse_constant=_refuse)  # NaN and Infinity are not JSON
        except (ValueError, RecursionError):
            return False, False
        return validator.is_valid(value), True

    return by_row(FIGURES, judge)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _read(params: JsonSchemaParams) -> Any:
    if params.file is None:
        return params.inline
    try:
        return json.loads(Path(params.file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(params, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _wrong(params, f"is not JSON: {error}") from None


def _wrong(params: JsonSchemaParams, message: str) -> RecipeError:
    return RecipeError('score "json_schema"', [Problem(message=f"{params.file or 'inline'}  {message}")])


SPEC = ScoreSpec(name="json_schema", params=JsonSchemaParams, figures=lambda _: FIGURES, build=build)
