"""Which weights are trained: one file per method, one line here."""

from distft.core.registry import Registry
from distft.model.adapters import (
    adalora,
    bottleneck,
    freeze,
    full,
    ia3,
    loha,
    lokr,
    lora,
    oft,
    p_tuning,
    peft_types,
    prefix_tuning,
    prompt_tuning,
    qlora,
    vera,
)
from distft.model.adapters.spec import MethodSpec

METHODS: Registry[MethodSpec] = Registry("method")
METHODS.add(full.SPEC)
METHODS.add(lora.SPEC)
METHODS.add(qlora.SPEC)
METHODS.add(adalora.SPEC)
METHODS.add(freeze.SPEC)
METHODS.add(bottleneck.SPEC)
METHODS.add(prompt_tuning.SPEC)
METHODS.add(p_tuning.SPEC)
METHODS.add(prefix_tuning.SPEC)
METHODS.add(ia3.SPEC)
METHODS.add(vera.SPEC)
METHODS.add(oft.SPEC)
METHODS.add(loha.SPEC)
METHODS.add(lokr.SPEC)
METHODS.add(peft_types.SPEC)

__all__ = ["METHODS", "MethodSpec"]
