"""LoKr: a Kronecker product of two small matrices beside frozen weights (PEFT).

Source: https://arxiv.org/abs/2309.14859
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distft.model.adapters.peft_tuner import TunerParams, tuner_spec


class LokrParams(TunerParams):
    """PEFT's names."""

    r: int = Field(default=8, ge=1)
    """Rank of the larger factor, where that has fewer parameters than the whole matrix."""
    alpha: float = Field(default=8.0, gt=0)
    """The update is scaled by alpha / r."""
    decompose_both: bool = False
    """Make the smaller factor a product of rank r as well."""
    decompose_factor: int = Field(default=-1, ge=-1)
    """Size of the smaller factor; -1: as near to the square root of the layer's as it divides."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the update's rows that are left out, in training."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters that are left out, in training."""


def _config(params: LokrParams, settings: dict[str, Any]) -> Any:
    from peft import LoKrConfig

    rest: Any = {"alpha": params.alpha}  # PEFT takes any number
    return LoKrConfig(
        **settings,
        **rest,
        r=params.r,
        decompose_both=params.decompose_both,
        decompose_factor=params.decompose_factor,
        rank_dropout=params.rank_dropout,
        module_dropout=params.module_dropout,
    )


def _starts_at_zero(name: str) -> bool:
    return ".lokr_w1." in name or ".lokr_w1_a." in name


SPEC = tuner_spec(name="lokr", title="LoKr", params=LokrParams, config=_config, starts_at_zero=_starts_at_zero)
