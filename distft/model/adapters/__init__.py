"""Which weights are trained: one file per method, one line here."""

from distft.core.registry import Registry
from distft.model.adapters import full, lora, qlora
from distft.model.adapters.spec import MethodSpec

METHODS: Registry[MethodSpec] = Registry("method")
METHODS.add(full.SPEC)
METHODS.add(lora.SPEC)
METHODS.add(qlora.SPEC)

__all__ = ["METHODS", "MethodSpec"]
