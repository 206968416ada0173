"""`field_match`: named fields of the answer, a JSON object or lines of `key: value`, are those of the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from distft.core.errors import DataError
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references

_LINE = re.compile(r"^\s*([^:\n]{1,100}?)\s*:[ \t]*(.*?)\s*$", re.MULTILINE)
_MISSING = object()


class FieldMatchParams(ReferenceParams):
    """Which fields, and how they are written."""

    fields: tuple[str, ...] = Field(min_length=1, examples=[["severity", "component"]])
    """Names; a dot goes into a JSON object: `address.city`."""
    form: Literal["auto", "json", "lines"] = "auto"
    """auto = JSON when the text starts with a brace, else lines."""
    ignore_case: bool = False
    """For texts, not for names."""


def figures(params: FieldMatchParams) -> tuple[MetricInfo, ...]:
    """Return all fields right; the share of fields that are; each by itself."""
    each = (MetricInfo(name=f"field_match.{name}", binary=True) for name in params.fields)
    return MetricInfo(name="field_match", binary=True), MetricInfo(name="fields_right"), *each


def read_fields(text: str, form: str) -> Mapping[str, Any] | None:
    """Read the fields of a text; None when it has none of that form.

    Of a name written twice, the first counts in lines and the last in JSON.
    """
    if form == "json" or (form == "auto" and text.lstrip().startswith("{")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None
    fields: dict[str, str] = {}
    for name, value in _LINE.findall(text):
        fields.setdefault(name, value)
    return fields or None


def build(params: FieldMatchParams) -> Scorer:
    """Build the scorer: a reference that lacks a named field is a mistake in the data, an answer that does is wrong."""

    def judge(answer: Answer) -> list[float]:
        predicted = read_fields(answer.text, params.form)
        best: list[float] = []
        for right in references(answer, params.reference):
            wanted = read_fields(right, params.form)
            each = []
            for name in params.fields:
                value = _value(wanted, name)
                if value is _MISSING:
                    raise DataError(f'{answer.id}: the reference has no field "{name}": {right[:80]!r}')
                each.append(float(_same(_value(predicted, name), value, params.ignore_case)))
            best = max(best, [float(all(each)), sum(each) / len(each), *each])
        return best

    return by_row(figures(params), judge)


def _value(fields: Mapping[str, Any] | None, name: str) -> Any:
    """Return the field, looked up by its whole name first: a line's key may have a dot in it."""
    if fields is None:
        return _MISSING
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _same(prediction: Any, reference: Any, ignore_case: bool) -> bool:
    if isinstance(prediction, bool) != isinstance(reference, bool):  # Python takes True for 1, JSON does not
        return False
    if isinstance(prediction, str) and isinstance(reference, str):
        prediction, reference = prediction.strip(), reference.strip()
        return prediction.casefold() == reference.casefold() if ignore_case else prediction == reference
    return prediction == reference


SPEC = ScoreSpec(name="field_match", params=FieldMatchParams, figures=figures, build=build)
