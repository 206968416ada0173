"""Any type of adapter that PEFT has: its config's fields are keys of the recipe, checked against the installed PEFT.

Types that have a method of their own, or that train something else than they say, are refused with the reason
(docs/peft-types.md; `make peft-types` tries them all).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from distft.core.registry import Params, nearest
from distft.model.adapters.peft_tuner import TunerParams, TunerParamsOn4bit, tuner_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distft.core.engine_traits import EngineTraits

OWN_METHODS = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "VERA": "vera",
    "OFT": "oft",
    "LOHA": "loha",
    "LOKR": "lokr",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
}
"""Type -> the method that trains it."""
_DECOMPOSED = "it starts from a decomposition of the base's weights, which engines fill later, block by block"
_TASKS = "its forward wants the task of every row, which rows do not say"
REFUSED = {
    "LN_TUNING": 'it trains norms; name = "freeze", norms = true does',
    "XLORA": "it mixes adapters that were trained before, in two forwards for each",
    "POLY": _TASKS,
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "CPT": "its forward wants the kind of every token, which rows do not say",
    "CARTRIDGE": "its keys and values start from a text that the model reads first",
    "ADAPTION_PROMPT": "its prompts stand in copies of attention that know no packed documents",
    "SHADOW": "its loss needs the labels inside of PEFT's forward",
    "ADAMSS": _DECOMPOSED,
    "FROD": _DECOMPOSED,
    "OSF": _DECOMPOSED,
    "TINYLORA": _DECOMPOSED,
    "PSOFT": _DECOMPOSED,
    "LILY": "it averages its routing over all tokens of a forward, so that documents of a row change each other",
    "SUPERTUNING": "it trains the largest of the base's weights, which engines fill later, block by block",
    "DELORA": "its scale follows from the base's weights, which engines fill later, block by block",
    "TRAINABLE_TOKENS": "it starts as rows of the embedding, which engines fill later",
}
"""Type -> why it is not trained here."""
ON_4BIT = frozenset(
    {"BOFT", "PVERA", "RANDLORA", "FOURIERFT", "WAVEFT", "VBLORA", "MISS", "ROAD", "HIRA", "SHIRA", "C3A", "GRALORA",
     "BEFT"}
)  # fmt: skip
"""Types whose logits beside a base in 4 bits are those beside the same base dequantised."""
_SHARED = "layers of several blocks share a tensor, which is cut with one block"
REFUSED_CUT_BY_BLOCK = {
    "UNILORA": _SHARED,
    "VBLORA": _SHARED,
    "BEFT": "its tensors have one row each, of which other ranks would have none",
}
"""Type -> why it cannot be trained where parameters are cut by block (`EngineTraits.parameters`)."""
_OURS = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "target_modules", "modules_to_save", "exclude_modules", "fan_in_fan_out", "bias", "runtime_config"}
)  # fmt: skip
"""Fields of PEFT's configs that follow from the rest of the recipe."""


class PeftTypeParams(TunerParamsOn4bit):
    """The type, and as further keys the fields of its config in PEFT."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["HRA"])
    """Name of the type in PEFT, such as "HRA"; its config's fields are keys of this table."""

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        configs = registered_types()
        if name not in configs:
            near = nearest(name.upper(), list(configs))
            hint = f', did you mean "{near}"?' if near else ""
            trained = ", ".join(sorted(set(configs) - {*REFUSED, *OWN_METHODS}))
            raise ValueError(f"PEFT {_version()} has no type {name!r}{hint}  it has {trained}")
        if name in OWN_METHODS:
            raise ValueError(f'{name} has a method of its own: name = "{OWN_METHODS[name]}"')
        if name in REFUSED:
            raise ValueError(f"{name} is not trained here: {REFUSED[name]}")
        return name

    @classmethod
    def for_table(cls, raw: Mapping[str, Any]) -> type[Params]:
        """Return the class with the fields of the type's config."""
        name = raw.get("type")
        if not isinstance(name, str) or name not in registered_types() or name in {*REFUSED, *OWN_METHODS}:
            return cls
        return _params_of(name)

    def fields_of_type(self) -> dict[str, Any]:
        """Return the values of the config's fields that the recipe gives."""
        ours = set(PeftTypeParams.model_fields)
        values = {**{name: getattr(self, name) for name in type(self).model_fields}, **(self.model_extra or {})}
        return {name: value for name, value in values.items() if name not in ours and value is not None}


class _KnownTypeParams(PeftTypeParams):
    """Of one type: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="after")
    def _tried_on_4bit(self) -> Self:
        if self.quant is not None and self.type not in ON_4BIT:
            raise ValueError(f"quant: {self.type} has not been seen to train rightly beside 4 bits: leave it out")
        return self


@functools.cache
def _params_of(name: str) -> type[Params]:
    config = registered_types()[name]
    hints, fields = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if field.name in _OURS or not field.init:
            continue
        about = " ".join(str(field.metadata.get("help", "")).split())
        fields[field.name] = (_as_in_json(hints[field.name]) | None, Field(default=None, description=about or None))
    made: Any = create_model(f"{name.title()}Params", __base__=_KnownTypeParams, **fields)
    return made


def _as_in_json(hint: Any) -> Any:
    """Return a type that JSON has for a field's: what PEFT nests further is its own affair."""
    origin = typing.get_origin(hint)
    if origin is typing.Union or type(hint).__name__ == "UnionType":
        members = [_as_in_json(member) for member in typing.get_args(hint) if member is not type(None)]
        return functools.reduce(lambda left, right: left | right, members) if members else str
    if origin is typing.Literal:
        return hint
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        inner = [_as_in_json(member) for member in typing.get_args(hint) if member is not Ellipsis]
        return list[inner[0]] if origin is list and inner else list[Any]
    if origin is dict or hint is dict or dataclasses.is_dataclass(hint):
        return dict[str, Any]
    if hint in (str, int, float, bool):
        return hint
    return str  # enumerations of texts


@functools.cache
def _configs_of(count: int) -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    return {str(getattr(name, "value", name)): config for name, config in CONFIGS.items()}


def registered_types() -> dict[str, Any]:
    """Return the config of every type that is registered with the installed PEFT, by name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return _configs_of(len(PEFT_TYPE_TO_CONFIG_MAPPING))


def _version() -> str:
    from importlib.metadata import version

    return version("peft")


def _config(params: PeftTypeParams, settings: dict[str, Any]) -> Any:
    config = registered_types()[params.type]
    taken = {field.name for field in dataclasses.fields(config)}
    if "target_modules" not in taken:
        raise ValueError(f"{params.type} has no target_modules: it is no adapter of layers")
    missing = [name for name, value in settings.items() if value is not None and name not in taken]
    if missing:
        raise ValueError(f"{params.type} has no {missing[0]}, which this model needs: name target_modules")
    return config(**{name: value for name, value in settings.items() if name in taken}, **params.fields_of_type())


def _blocks_differ(params: TunerParams) -> bool:
    fields = params.fields_of_type() if isinstance(params, PeftTypeParams) else {}
    return bool(fields.get("layers_to_transform") is not None or re.search(r"\d", str(fields.get("rank_pattern", ""))))


def _refuses(params: TunerParams, engine: EngineTraits) -> str:
    name = params.type if isinstance(params, PeftTypeParams) else ""
    why = REFUSED_CUT_BY_BLOCK.get(name, "") if engine.parameters == "cut by block" else ""
    return why and f"type: {name} cannot be trained under {engine.name}: {why}"


SPEC = replace(
    tuner_spec(name="peft", title="PEFT", params=PeftTypeParams, config=_config, blocks_differ=_blocks_differ),
    refuses=_refuses,
)
