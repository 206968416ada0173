"""VeRA: vectors that scale random low-rank products which all layers share (PEFT).

Source: https://arxiv.org/abs/2310.11454
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distft.model.adapters.peft_tuner import TunerParamsOn4bit, tuner_spec


class VeraParams(TunerParamsOn4bit):
    """PEFT's names."""

    r: int = Field(default=256, ge=1)
    """Rank of the shared products, which are not trained."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    d_initial: float = Field(default=0.1, gt=0)
    """What the vector between the two products starts as."""
    projection_prng_key: int = Field(default=0, ge=0)
    """Seed of the shared products."""


def _config(params: VeraParams, settings: dict[str, Any]) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        **settings,
        r=params.r,
        vera_dropout=params.dropout,
        d_initial=params.d_initial,
        projection_prng_key=params.projection_prng_key,
    )


def _starts_at_zero(name: str) -> bool:
    return ".vera_lambda_b." in name


SPEC = tuner_spec(name="vera", title="VeRA", params=VeraParams, config=_config, starts_at_zero=_starts_at_zero)
