"""Update rules and learning-rate schedules; one file each, one line here.

The optimizer sees plain local tensors only (see `distft.engine.master_weights`), so any `torch.optim.Optimizer` works
under every engine as long as it treats elements, or blocks of them, independently.
"""

from distft.core.registry import Registry
from distft.optim import (
    adafactor,
    adamw,
    adamw_4bit,
    adamw_8bit,
    adamw_fp8,
    apollo,
    galore,
    lion,
    muon,
    paged,
    schedules,
)
from distft.optim.spec import MATRIX, OptimizerSpec, ScheduleSpec, StateBytes

OPTIMIZERS: Registry[OptimizerSpec] = Registry("optimizer")
OPTIMIZERS.add(adamw.SPEC)
OPTIMIZERS.add(adamw_8bit.SPEC)
OPTIMIZERS.add(adamw_4bit.SPEC)
OPTIMIZERS.add(adamw_fp8.SPEC)
OPTIMIZERS.add(paged.ADAMW_32BIT)
OPTIMIZERS.add(paged.ADAMW_8BIT)
OPTIMIZERS.add(lion.SPEC)
OPTIMIZERS.add(adafactor.SPEC)
OPTIMIZERS.add(muon.SPEC)
OPTIMIZERS.add(galore.SPEC)
OPTIMIZERS.add(apollo.SPEC)

SCHEDULES: Registry[ScheduleSpec] = Registry("schedule")
SCHEDULES.add(schedules.CONSTANT)
SCHEDULES.add(schedules.LINEAR)
SCHEDULES.add(schedules.COSINE)
SCHEDULES.add(schedules.WSD)

__all__ = ["MATRIX", "OPTIMIZERS", "SCHEDULES", "OptimizerSpec", "ScheduleSpec", "StateBytes"]
