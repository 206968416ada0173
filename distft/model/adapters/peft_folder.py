"""A model with an adapter that PEFT itself reads from its folder: what merged weights are compared with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn


def with_adapter(lm: Any, folder: Path) -> nn.Module:
    """Return transformers' model `lm`, filled, with the adapter of `folder` in PEFT's own layers, for forwards.

    Raises:
        RecipeError: PEFT cannot put this adapter on this model, or leaves some of its tensors out.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(lm, str(folder), is_trainable=False)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                str(folder), [Problem(message=f"PEFT cannot load it on this base: {reason}", fix="check --base")]
            ) from error
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    if missing:
        raise RecipeError(str(folder), [Problem(message=missing[0][:300], fix="check --base")])
    return model.eval()
