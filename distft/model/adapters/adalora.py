"""AdaLoRA: products B diag(E) A of which training keeps those that matter, until a budget of ranks is kept (PEFT).

Source: https://arxiv.org/abs/2303.10512
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from distft.core.errors import Problem, RecipeError
from distft.model.adapters.lora import ADAPTER
from distft.model.adapters.peft_tuner import TunerParams, tuner_spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from distft.core.engine_traits import EngineTraits


class AdaloraParams(TunerParams):
    """PEFT's names."""

    init_r: int = Field(default=12, ge=1)
    """Rank that every layer starts with."""
    target_r: int = Field(default=8, ge=1)
    """Rank that layers keep on average."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / init_r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    tinit: int = Field(default=0, ge=0)
    """Updates before ranks are taken away."""
    tfinal: int = Field(default=0, ge=0)
    """Updates at the end in which no more are."""
    delta_t: int = Field(default=1, ge=1)
    """Updates between two allocations; PEFT's deltaT."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of importances."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of how much they vary."""
    orth_reg_weight: float = Field(default=0.5, ge=0)
    """Weight of the distance of A and B from orthogonal matrices, which is added to the loss."""

    @model_validator(mode="after")
    def _ranks_are_taken_away(self) -> Self:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r: {self.target_r} is not less than init_r = {self.init_r}: nothing is allocated")
        return self


def _config(params: AdaloraParams, settings: dict[str, Any]) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        **settings, init_r=params.init_r, target_r=params.target_r, lora_alpha=params.alpha,  # type: ignore[arg-type]
        lora_dropout=params.dropout, tinit=params.tinit, tfinal=params.tfinal, deltaT=params.delta_t,
        beta1=params.beta1, beta2=params.beta2, orth_reg_weight=params.orth_reg_weight,
        total_step=params.tinit + params.tfinal + 1,  # PEFT asks for some; what allocates here knows the run's
    )  # fmt: skip


def _starts_at_zero(name: str) -> bool:
    return ".lora_E." in name


def _refuses(params: AdaloraParams, engine: EngineTraits) -> str:
    """Refuse engines that cut tensors: importances are compared over whole ones."""
    if engine.parameters == "whole" and not engine.flattens:
        return ""
    return f"adalora cannot be trained under {engine.name}: it looks at whole tensors"


def _attach(lm: Any, params: AdaloraParams, dtype: torch.dtype) -> nn.Module:
    """Wrap a model; the rank that layers divide by, which PEFT has as a frozen parameter, is a number here."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    wrapped = _TUNER.attach(lm, params, dtype)
    for module in wrapped.modules():
        if isinstance(module, AdaLoraLayer):
            layer: Any = module
            del layer.ranknum
            layer.ranknum = {ADAPTER: float(params.init_r)}
    return wrapped


def _optimizer(params: AdaloraParams, optim: Any, num_steps: int) -> Any:
    """Return the recipe's optimizer with ranks allocated after each update; 0 steps: for a plan."""
    end = num_steps - params.tfinal
    if num_steps and params.tinit >= end:
        message = f"[method] tinit: {params.tinit} of {num_steps} updates are before ranks are taken away, and "
        message += f"{params.tfinal} after it: none is left"
        raise RecipeError("recipe", [Problem(message=message, fix="lower tinit or tfinal, or train longer")])

    def build(given: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from distft.model.adapters.rank_allocation import RankAllocator, RankSchedule

        schedule = RankSchedule(
            init_r=params.init_r, target_r=params.target_r, tinit=params.tinit, tfinal=params.tfinal,
            delta_t=params.delta_t, total=num_steps,
        )  # fmt: skip
        betas = (params.beta1, params.beta2)
        return RankAllocator(groups, lambda inner: optim.build(given, inner), schedule, betas)

    def state_bytes(shape: tuple[int, ...]) -> Any:
        size = optim.state_bytes(shape)
        numel = 1
        for side in shape:
            numel *= side
        more = 4 * numel * (3 if len(shape) == 2 and shape[1] == 1 else 2)  # E also has what is masked
        return replace(size, per_tensor=size.per_tensor + more)

    if optim.state_bytes is None or not optim.elementwise or optim.matrix_state_bytes is not None:
        message = (
            f'[method] name = "adalora" keeps its importances beside AdamW\'s moments, and [optim] is "{optim.name}"'
        )
        raise RecipeError("recipe", [Problem(message=message, fix='[optim] name = "adamw"')])
    return replace(optim, build=build, state_bytes=state_bytes, elementwise=False, per_tensor=False)


def _penalty(params: AdaloraParams, model: nn.Module) -> Tensor:
    """Return the mean distance of A Aᵀ and Bᵀ B from the identity, weighted, fp32 [].

    Source: peft/tuners/adalora/model.py (AdaLoraModel.forward)
    """
    import torch

    total, count = torch.zeros(()), 0
    for name, param in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            matrix = param.float()
            product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            away = torch.linalg.norm(product - torch.eye(len(product), device=product.device, dtype=product.dtype))
            total, count = total.to(away.device) + away, count + 1
    return params.orth_reg_weight * total / count


_TUNER = tuner_spec(
    name="adalora", title="AdaLoRA", params=AdaloraParams, config=_config, starts_at_zero=_starts_at_zero
)
SPEC = replace(_TUNER, attach=_attach, refuses=_refuses, optimizer=_optimizer, penalty=_penalty)
