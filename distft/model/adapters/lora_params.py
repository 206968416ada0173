"""The keys of LoRA."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distft.core.registry import Params


class EvaParams(Params):
    """How `init = "eva"` looks at the training rows; PEFT's names."""

    rho: float = Field(default=1.0, ge=1, le=100)
    """Layers get up to rho times the rank, where inputs vary in more directions, and others less: their sum stays.
    1: every layer has its rank. Above 1 nothing can be planned before ranks are known."""
    tau: float = Field(default=0.99, gt=0, lt=1)
    """Cosine between a direction before and after a batch from which on it has converged."""
    tokens: Literal["trained", "all"] = "trained"
    """Whose inputs are looked at: those of tokens that are trained, or of all."""
    adjust_scaling: bool = True
    """Alpha grows and shrinks with a layer's rank, so that the scale of the update stays; PEFT's
    `adjust_scaling_factors`."""


class LoraParams(Params):
    """PEFT's names."""

    r: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: every linear layer but the head, name endings such as ["q_proj"], embeddings and the
    head among them, or a regular expression that fits whole names."""
    target_parameters: tuple[str, ...] = ()
    """Weights of all experts in one tensor that get an adapter, by the ends of their names, such as
    "experts.down_proj". "all-linear" means them too; beside a list of target_modules they are named here or there."""
    rslora: bool = False
    """Scale by alpha / sqrt(r): higher ranks keep learning."""
    dora: bool = False
    """Learn the magnitude of each output apart from its direction."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole beside the adapter, such as "lm_head"."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type adapters compute in; auto = the model's. The optimizer keeps an fp32 master either way."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """What the matrices start from: PEFT's default; noise of 1 / r; halves of an orthogonal matrix; the largest
    singular directions of the weight (pissa) or the first ones of its QR (olora), which are taken out of the base and
    put back into what is saved; what 4 bits have lost of the weight (loftq, with qlora); the directions in which the
    inputs of a layer vary most over the training rows (eva)."""
    eva: EvaParams | None = None
    """With `init = "eva"`: how rows are looked at."""
    rank_pattern: dict[str, int] = Field(default={})
    """Ranks of layers by the end of their names, or by a regular expression for it, such as {"down_proj" = 32}."""
    alpha_pattern: dict[str, float] = Field(default={})
    """Alphas of layers, in the same way."""
    layers_to_transform: tuple[int, ...] = ()
    """Indices of the blocks that get adapters; none given: all."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens of the vocabulary whose rows of the embedding (and of the head) are trained too, such as "<|im_end|>".
    Tokens that [model] adds are among them by themselves."""
    deploy: Literal["q8_0", "q4_0", "nf4", "int4"] | None = None
    """Low-bit format that the merged model will have: every forward computes with the weights as that format's writer
    rounds them, so that the exported model is the one that was trained. q8_0 and q4_0: GGUF; nf4: bitsandbytes; int4:
    compressed-tensors, groups of 128."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """The matrices B, which start at zero, learn with this many times the learning rate (LoRA+, which takes 16)."""
    start: str | None = None
    """Go on from an adapter that was trained before, instead of from none: its folder, the folder of a run, or a hub
    id. Base, layers and sizes have to be the same."""

    @model_validator(mode="after")
    def _init_fits(self) -> Self:
        if self.init in ("pissa", "olora") and (self.dora or self.modules_to_save):
            raise ValueError(f'init = "{self.init}" takes a part out of the base: leave dora and modules_to_save out')
        if self.start is not None and self.init != "default":
            raise ValueError("start goes on from an adapter, and init begins one: leave one of the two out")
        if self.eva is not None and self.init != "eva":
            raise ValueError('eva: has no effect without init = "eva"')
        if self.init == "eva" and self.rank_pattern and (self.eva is None or self.eva.rho == 1):
            raise ValueError('rank_pattern: init = "eva" lets layers with equal inputs exchange ranks that differ: set '
                             "eva.rho above 1, where ranks move, or leave it out")  # fmt: skip
        if self.target_parameters and self.target_modules == "all-linear":
            raise ValueError('target_parameters: target_modules = "all-linear" means every expert tensor already')
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values())):
            raise ValueError('init = "orthogonal" takes even ranks: r')
        wrong = [name for name, rank in self.rank_pattern.items() if rank < 1]
        if wrong:
            raise ValueError(f"rank_pattern: {wrong[0]} = {self.rank_pattern[wrong[0]]} is no rank: from 1 on")
        return self

    @model_validator(mode="after")
    def _deployed_is_merged(self) -> Self:
        if self.deploy is None:
            return self
        named = {"dropout": self.dropout, "dora": self.dora, "modules_to_save": self.modules_to_save,
                 "target_parameters": self.target_parameters}  # fmt: skip
        wrong = [key for key, value in named.items() if value]
        if wrong:
            raise ValueError(f"deploy: rounds W + BA in every forward, which {wrong[0]} does not leave as a sum")
        if self.init in ("pissa", "olora", "loftq"):
            raise ValueError(f'deploy: init = "{self.init}" starts from another base than the one that is merged into')
        return self

    @model_validator(mode="after")
    def _loftq_has_4_bits(self) -> Self:
        if self.init == "loftq" and not hasattr(self, "quant"):
            raise ValueError('init = "loftq" starts from what 4 bits lose: name = "qlora"')
        if self.init in ("pissa", "olora") and hasattr(self, "quant"):
            raise ValueError(f'init = "{self.init}" changes the base, and 4 bits round it anew: use "loftq"')
        return self


def blocks_differ(params: LoraParams) -> bool:
    """Return whether what is trained differs from block to block."""
    return bool(params.layers_to_transform) or any(
        re.search(r"\d", entry) for entry in (*params.rank_pattern, *params.alpha_pattern)
    )


def reads_rows(params: LoraParams) -> bool:
    """Return whether A is found in the training rows."""
    return params.init == "eva"


def without_rows(params: LoraParams) -> LoraParams:
    """Return the settings of an adapter that starts as PEFT's default: for forwards before anything is found."""
    return params.model_copy(update={"init": "default", "eva": None}) if params.init == "eva" else params


def settled(params: LoraParams, config: dict[str, Any]) -> LoraParams:
    """Return the settings with the ranks that a saved adapter's config has, where they were found."""
    if params.init != "eva":
        return params
    changes: dict[str, Any] = {}
    if (params.eva or EvaParams()).rho > 1:
        changes = {key: config[key] for key in ("rank_pattern", "alpha_pattern")}
        changes |= {"target_modules": tuple(config["target_modules"]), "layers_to_transform": ()}
    return without_rows(params).model_copy(update=changes)


def unplanned(params: LoraParams) -> str:
    """Return why a plan cannot count what is trained; "" where it can."""
    rho = (params.eva or EvaParams()).rho
    if params.init != "eva" or rho == 1:
        return ""
    return f'init = "eva" with rho = {rho:g} finds the ranks in the rows, when training begins'
