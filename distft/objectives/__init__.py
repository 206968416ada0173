"""What is minimised: one file per objective, one line here; pure torch, no ranks."""

from distft.core.registry import Registry
from distft.objectives import bco, cpo, distill, dpo, grpo, kto, orpo, ppo, reinforce, reward, rloo, sft, simpo
from distft.objectives.spec import ObjectiveSpec

OBJECTIVES: Registry[ObjectiveSpec] = Registry("objective")
OBJECTIVES.add(sft.SPEC)
OBJECTIVES.add(dpo.SPEC)
OBJECTIVES.add(orpo.SPEC)
OBJECTIVES.add(simpo.SPEC)
OBJECTIVES.add(cpo.SPEC)
OBJECTIVES.add(kto.SPEC)
OBJECTIVES.add(bco.SPEC)
OBJECTIVES.add(reward.SPEC)
OBJECTIVES.add(grpo.SPEC)
OBJECTIVES.add(rloo.SPEC)
OBJECTIVES.add(reinforce.SPEC)
OBJECTIVES.add(ppo.SPEC)
OBJECTIVES.add(distill.SPEC)

__all__ = ["OBJECTIVES", "ObjectiveSpec"]
