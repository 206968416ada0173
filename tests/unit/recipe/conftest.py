"""Small registries that stand in for the real ones, so that this room is tested alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from distft.core.registry import NoParams, Params, Registry
from distft.recipe import Recipe, Registries, parse_recipe

MINIMAL = """\
name = "run"
[model]
path = "base"
[[data.train]]
path = "train.jsonl"
"""


@dataclass(frozen=True)
class Part:
    name: str
    params: type[Params] = NoParams
    elementwise: bool = True
    flattens: bool = False


class LoraParams(Params):
    """Low-rank adapters."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale, divided by r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Quant(Params):
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


class QloraParams(LoraParams):
    quant: Quant = Quant()


class AdamWParams(Params):
    learning_rate: float = Field(default=2e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class WarmupParams(Params):
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> WarmupParams:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_steps cannot be set together with warmup_ratio")
        return self


class CosineParams(WarmupParams):
    min_ratio: float = Field(default=0.0, ge=0, le=1)


class OffloadParams(Params):
    offload: Literal["none", "optimizer", "all"] = "none"


class MuonParams(Params):
    momentum: float
    """Required on purpose, without an example."""


def _registry(noun: str, *parts: Part) -> Registry[Any]:
    registry: Registry[Any] = Registry(noun)
    for part in parts:
        registry.add(part)
    return registry


REGISTRIES = Registries(
    method=_registry("method", Part("full"), Part("lora", LoraParams), Part("qlora", QloraParams)),
    objective=_registry("objective", Part("sft")),
    optim=_registry(
        "optimizer",
        Part("adamw", AdamWParams),
        Part("adamw_8bit", AdamWParams),
        Part("adafactor", AdamWParams, elementwise=False),
        Part("muon", MuonParams, elementwise=False),
    ),
    schedule=_registry(
        "schedule", Part("constant", WarmupParams), Part("linear", WarmupParams), Part("cosine", CosineParams)
    ),
    engine=_registry(
        "engine",
        Part("auto", OffloadParams),
        Part("solo"),
        Part("ddp"),
        Part("zero3", OffloadParams, flattens=True),
        Part("fsdp2", flattens=True),
    ),
    formats=_registry("format", Part("messages"), Part("prompt_completion"), Part("text")),
    templates=("chatml", "llama3", "plain"),
)


@pytest.fixture(scope="session")
def registries() -> Registries:
    return REGISTRIES


@pytest.fixture
def minimal() -> str:
    """The least that is a recipe: five lines."""
    return MINIMAL


@pytest.fixture
def parse() -> Callable[..., Recipe]:
    """Parses text as `r.toml` with the fake registries."""

    def parse(text: str = MINIMAL, *overrides: str) -> Recipe:
        return parse_recipe(text, source="r.toml", registries=REGISTRIES, overrides=overrides)

    return parse
