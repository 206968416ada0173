"""What is minimised: one file per objective, one line here; pure torch, no ranks."""

from distft.core.registry import Registry
from distft.objectives import sft
from distft.objectives.spec import ObjectiveSpec

OBJECTIVES: Registry[ObjectiveSpec] = Registry("objective")
OBJECTIVES.add(sft.SPEC)

__all__ = ["OBJECTIVES", "ObjectiveSpec"]
