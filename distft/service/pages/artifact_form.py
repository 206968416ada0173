"""The form of exports, merges and combinations: what of the API it asks for, and which of its fields is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from distft.merge_options import DTYPES
from distft.service.artifact_choices import export_formats, hows
from distft.service.errors import ApiError, refuse
from distft.service.wire_artifacts import ArtifactRequest

Short = Annotated[str, StringConstraints(max_length=64)]
Model = Annotated[str, StringConstraints(max_length=300)]


@dataclass(frozen=True, kw_only=True)
class CombineSetting:
    """A setting that some ways of combining have."""

    name: str
    hint: str
    of: tuple[str, ...]
    """The ways that have it."""


def combine_settings() -> list[CombineSetting]:
    """Return the settings of all ways of combining, each once."""
    hints: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for how in hows().values():
        for name, field in how.params.model_fields.items():
            hints.setdefault(name, (field.description or "").split(";")[0].rstrip("."))
            owners.setdefault(name, []).append(how.name)
    return [CombineSetting(name=name, hint=hints[name], of=tuple(owners[name])) for name in hints]


def format_choices() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return of each format its name, its note, and its levels as (value, label); one for a format without levels."""
    return [
        (
            spec.name,
            spec.title,
            [(f"{spec.name}/{level}", f"{spec.name} {level}") for level in _default_first(spec.levels, spec)]
            or [(spec.name, spec.name)],
        )
        for spec in export_formats().values()
    ]


def _default_first(levels: tuple[str, ...], spec: Any) -> list[str]:
    return sorted(levels, key=lambda level: level != spec.default_level)


class ArtifactForm(BaseModel):
    """What the form sends, as it was typed."""

    model_config = ConfigDict(frozen=True)

    kind: Short = ""
    model: Model = ""
    format: Annotated[str, StringConstraints(max_length=130)] = ""
    """Name, a slash and the level."""
    dtype: Short = ""
    how: Short = ""
    rank: Short = ""
    weight: Short = "1"
    """Of `model`."""
    others: list[Model] = []
    other_weights: list[Short] = []
    """One for each of `others`; an empty one leaves it out."""
    setting_names: list[Short] = []
    settings: list[Short] = []
    """One for each of `setting_names`; an empty one is not said."""

    def typed(self) -> dict[str, Any]:
        """Return what was typed, for the form to show again."""
        values = self.model_dump(include={"format", "dtype", "how", "rank", "weight"})
        values["others"] = dict(zip(self.others, self.other_weights, strict=False))
        values["settings"] = dict(zip(self.setting_names, self.settings, strict=False))
        return values

    def request(self) -> ArtifactRequest:
        """Return what the API is asked for.

        Raises:
            ApiError: nothing can be asked for this; `param` is the field of the API that is wrong.
        """
        asked: dict[str, Any] = {"kind": self.kind, "models": [self.model]}
        match self.kind:
            case "export":
                name, _, level = self.format.partition("/")
                asked |= {"format": name, "level": level or None}
            case "merge":
                asked["dtype"] = self.dtype or None
            case "combine":
                asked |= self._of_combine()
            case _:
                refuse("The kind is export, merge or combine.", param="kind")
        try:
            return ArtifactRequest.model_validate_json(json.dumps(asked))
        except ValidationError as error:
            first = error.errors()[0]
            raise ApiError(400, f"{first['msg']}.", param=str(first["loc"][0]), code="invalid_value") from None

    def _of_combine(self) -> dict[str, Any]:
        chosen = [(self.model, self.weight.strip() or "1")]
        pairs = zip(self.others, self.other_weights, strict=False)
        chosen += [(model, weight.strip()) for model, weight in pairs if weight.strip()]
        weights = [_number(weight, "weights") for _, weight in chosen]
        takes = self.how not in hows() or hows()[self.how].takes_weights
        given = zip(self.setting_names, self.settings, strict=False)
        settings = {name: _value(text.strip(), f"settings.{name}") for name, text in given if text.strip()}
        rank = self.rank.strip()
        if rank and not rank.isdecimal():
            refuse(f"'{rank}' is no rank: a whole number above 0, or nothing.", param="rank")
        return {
            "how": self.how or None,
            "models": [model for model, _ in chosen],
            "weights": weights if takes or any(weight != 1 for weight in weights) else None,
            "rank": int(rank) if rank else None,
            "settings": settings or None,
        }


def field_of(param: str | None) -> str:
    """Return the field of the form that a parameter of the API stands for."""
    match param or "":
        case "level":
            return "format"
        case "weights" | "models":
            return "others"
        case name:
            return name


def choices(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the form offers, and what was typed into it."""
    return {
        "formats": format_choices(),
        "dtypes": DTYPES,
        "hows": [(how.name, how.title) for how in hows().values()],
        "settings": combine_settings(),
        "chosen": {"format": "", "dtype": "", "how": "", "rank": "", "weight": "1", "others": {}, "settings": {}}
        | dict(typed),
    }


def _number(text: str, param: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        refuse(f"'{text}' is no number.", param=param)
    return value


def _value(text: str, param: str) -> bool | int | float:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return _number(text, param)
