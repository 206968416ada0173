"""(IA)3: vectors that scale keys, values and the input of a block's last product (PEFT).

Source: https://arxiv.org/abs/2205.05638
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from distft.model.adapters.peft_tuner import TunerParamsOn4bit, tuner_spec


class Ia3Params(TunerParamsOn4bit):
    """PEFT's names."""

    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Layers that get a vector: name endings, a regular expression that fits whole names, or "all-linear". The default
    has Llama's names."""
    feedforward_modules: str | tuple[str, ...] = ("down_proj",)
    """Those of them whose input is scaled instead of their output."""

    @model_validator(mode="after")
    def _feed_forward_is_targeted(self) -> Self:
        if not isinstance(self.target_modules, str) and not isinstance(self.feedforward_modules, str):
            lacking = [name for name in self.feedforward_modules if name not in self.target_modules]
            if lacking:
                raise ValueError(f"feedforward_modules names {lacking[0]}, which target_modules does not name")
        return self


def _config(params: Ia3Params, settings: dict[str, Any]) -> Any:
    from peft import IA3Config

    named = params.feedforward_modules
    return IA3Config(**settings, feedforward_modules=named if isinstance(named, str) else list(named))


SPEC = tuner_spec(name="ia3", title="(IA)³", params=Ia3Params, config=_config)
