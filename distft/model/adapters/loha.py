"""LoHa: the elementwise product of two low-rank products beside frozen weights (PEFT).

Source: https://arxiv.org/abs/2108.06098
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distft.model.adapters.peft_tuner import TunerParams, tuner_spec


class LohaParams(TunerParams):
    """PEFT's names."""

    r: int = Field(default=8, ge=1)
    """Rank of each of the two products; theirs has up to its square."""
    alpha: float = Field(default=8.0, gt=0)
    """The update is scaled by alpha / r."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the update's rows that are left out, in training."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters that are left out, in training."""


def _config(params: LohaParams, settings: dict[str, Any]) -> Any:
    from peft import LoHaConfig

    rest: Any = {"alpha": params.alpha}  # PEFT takes any number
    return LoHaConfig(
        **settings, **rest, r=params.r, rank_dropout=params.rank_dropout, module_dropout=params.module_dropout
    )


def _starts_at_zero(name: str) -> bool:
    return ".hada_w2_b." in name


SPEC = tuner_spec(name="loha", title="LoHa", params=LohaParams, config=_config, starts_at_zero=_starts_at_zero)
