"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


def _attach(lm: Any, params: NoParams, dtype: torch.dtype) -> nn.Module:
    return lm.requires_grad_(True)


def _owns(name: str) -> bool:
    return False


SPEC = MethodSpec(name="full", title="Full fine-tuning", params=NoParams, attach=_attach, owns=_owns)
