"""The form of model, method and settings: what of a draft it changes, and which of its fields is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from distft.advise.situation import GOALS
from distft.scores.grader import ROUGE_KINDS
from distft.service.drafts import JobDraft
from distft.service.errors import ApiError, refuse
from distft.service.jobs import JobService
from distft.service.wire import JobRequest

Short = Annotated[str, StringConstraints(max_length=64)]
Long = Annotated[str, StringConstraints(max_length=65_536)]
METHODS = {
    "supervised": "learn the answers",
    "dpo": "prefer one answer to another",
    "reinforcement": "write answers, and learn from what a grader says of them",
}
GRADERS = {
    "string_check": "compare two texts: right or wrong",
    "text_similarity": "how alike two texts are",
    "json": "several graders and a formula, or any other, as JSON",
}
OPERATIONS = {
    "eq": "is the reference",
    "ne": "is not the reference",
    "like": "holds the reference",
    "ilike": "holds the reference, in small or capital letters",
}
SIMILARITIES = tuple(ROUGE_KINDS)
_OF_GRADER = {
    "input": "grader_input",
    "reference": "grader_reference",
    "operation": "grader_operation",
    "evaluation_metric": "grader_metric",
}
"""Key of a grader -> its field."""


@dataclass(frozen=True, kw_only=True)
class SettingField:
    """A hyper-parameter of the form."""

    name: str
    title: str
    advised: str
    """What `distft advise` calls it."""
    hint: str
    method: str | None = None
    """The method that alone has it; None: all have."""


SETTINGS = (
    SettingField(
        name="n_epochs", title="Epochs", advised="epochs", hint="How often every row is seen; 1 to 50."
    ),
    SettingField(name="batch_size", title="Rows in a step", advised="global_batch_size", hint="1 to 256."),
    SettingField(
        name="learning_rate_multiplier", title="Learning rate, times", advised="learning_rate",
        hint="Of the model's own learning rate; 1 keeps it.",
    ),
    SettingField(
        name="beta", title="Beta", advised="beta", method="dpo",
        hint="How far the model may go from where it starts; up to 2.",
    ),
    SettingField(
        name="compute_multiplier", title="Answers, times 8", advised="answers_per_prompt",
        method="reinforcement", hint="1 is 8 answers to each prompt; up to 10.",
    ),
)  # fmt: skip


class ModelForm(BaseModel):
    """What the form sends, as it was typed."""

    model_config = ConfigDict(frozen=True)

    model: Short = ""
    method: Short = "supervised"
    goal: Short = ""
    suffix: Short = ""
    n_epochs: Short = "auto"
    batch_size: Short = "auto"
    learning_rate_multiplier: Short = "auto"
    beta: Short = "auto"
    compute_multiplier: Short = "auto"
    grader: Short = "string_check"
    grader_input: Long = "{{sample.output_text}}"
    grader_reference: Long = ""
    grader_operation: Short = "eq"
    grader_metric: Short = "rouge_l"
    grader_json: Long = ""

    def changes(self, jobs: JobService, draft: JobDraft) -> dict[str, Any]:
        """Return what of the draft's content becomes another.

        Raises:
            ApiError: no job could be asked for this; `param` is the field of this form that is wrong.
        """
        if self.goal and self.goal not in GOALS:
            refuse(f"Unknown goal: {self.goal}.", param="goal")
        if self.method not in METHODS:
            refuse(f"The method is one of {', '.join(METHODS)}.", param="method")
        values = {
            field.name: _number(field.name, getattr(self, field.name))
            for field in SETTINGS
            if field.method in (None, self.method)
        }
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("model", "method", "goal", "suffix")}
        changes["hyperparameters"] = {name: value for name, value in values.items() if value != "auto"}
        if self.method == "reinforcement":
            changes["grader"] = self._grader()
        try:
            _refuse_what_no_job_can_ask(jobs, draft, changes)
        except ApiError as error:
            raise ApiError(error.status, error.message, param=self._field(error.param or ""), code=error.code) from None
        return changes

    def _grader(self) -> dict[str, Any]:
        match self.grader:
            case "json":
                return _object(self.grader_json)
            case "string_check" | "text_similarity":
                if not self.grader_reference:
                    message = "Write what answers are compared with, such as {{item.answer}}, a key of the rows."
                    refuse(message, param="grader_reference")
                key, value = (
                    ("operation", self.grader_operation)
                    if self.grader == "string_check"
                    else ("evaluation_metric", self.grader_metric)
                )
                texts = {"input": self.grader_input, "reference": self.grader_reference}
                return {"type": self.grader, "name": "grader", **texts, key: value}
            case _:
                refuse(f"A grader is one of {', '.join(GRADERS)}.", param="grader")

    def _field(self, param: str) -> str:
        """Return the field that a parameter of the API's request stands for."""
        steps = param.split(".")
        if "grader" in steps:
            return "grader_json" if self.grader == "json" else _OF_GRADER.get(steps[-1], "grader")
        return "method" if steps[0] == "method" and steps[-1] == "type" else steps[-1]


def shown_grader(content: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a draft's grader as this form's fields; none: as the form begins."""
    begun = ModelForm()
    fields = {
        "grader": begun.grader,
        **{name: str(getattr(begun, name)) for name in (*_OF_GRADER.values(), "grader_json")},
    }
    if content is None:
        return fields
    plain = content.get("type") in ("string_check", "text_similarity") and content.get("name") == "grader"
    if not plain:
        return fields | {"grader": "json", "grader_json": json.dumps(content, ensure_ascii=False, indent=2)}
    return fields | {
        "grader": content["type"],
        **{_OF_GRADER[key]: content[key] for key in _OF_GRADER if key in content},
    }


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Raises:
        ApiError: there is none.
    """
    try:
        content = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        refuse("The grader is nested too deeply.", param="grader_json")
    except json.JSONDecodeError as error:
        refuse(f"This is no JSON: {error.msg}, line {error.lineno}, column {error.colno}.", param="grader_json")
    except ValueError as error:
        refuse(f"This is no JSON: {error}.", param="grader_json")
    if not isinstance(content, dict):
        refuse('A grader is a JSON object, such as {"type": "multi", …}.', param="grader_json")
    return content  # pyright: ignore[reportUnknownVariableType]


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _number(name: str, text: str) -> int | float | str:
    """Return what was typed as a number, or `auto`.

    Raises:
        ApiError: it is none.
    """
    if text.strip() in ("", "auto"):
        return "auto"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    refuse(f"'{text}' is no number: write one, or auto.", param=name)


def _refuse_what_no_job_can_ask(jobs: JobService, draft: JobDraft, changes: dict[str, Any]) -> None:
    """Raise what the API would say of a job like this; a file that is still missing is no mistake yet."""
    request = JobDraft(id=draft.id, content={**draft.content, **changes}, changed_at=0, job_id=None).request
    request["training_file"] = request.get("training_file") or "file-none"
    try:
        text = json.dumps({name: value for name, value in request.items() if name != "recipe"})
        asked = JobRequest.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ApiError(400, "It is nested too deeply.", param="grader", code="invalid_value") from None
        problems = error.errors()  # of `auto` or a number, what is wrong with the number tells more
        first = next((problem for problem in problems if problem["type"] != "literal_error"), problems[0])
        steps = [str(step) for step in first["loc"]] or ["grader"]  # no place: JSON nested more deeply than it is read
        known = {field.name for field in SETTINGS}
        param = next((step for step in steps if step in known), ".".join(steps))
        raise ApiError(400, f"{first['msg']}.", param=param, code="invalid_value") from None
    jobs.refuse_unserved(asked)
