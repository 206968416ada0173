"""Modules whose weights are those of another one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def tied_modules(lm: Any) -> dict[str, tuple[str, nn.Module]]:
    """Return, by name, what each tied module is tied to, while all tensors are still meta."""
    tied: dict[str, tuple[str, nn.Module]] = {}
    for target, origin in (getattr(lm, "all_tied_weights_keys", None) or {}).items():
        shared, name = target.rpartition(".")[0], origin.rpartition(".")[0]
        owner = lm.get_submodule(name)
        stand_in = copy.copy(owner)
        stand_in._parameters = dict(owner._parameters)
        tied[shared] = (name, stand_in)
    return tied
