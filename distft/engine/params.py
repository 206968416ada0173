"""The [engine] tables: what each engine is set by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distft.core.registry import Params
from distft.engine.grad_dtype import GradDtype

ShardWithin = Literal["world", "node"] | Annotated[int, Field(ge=1)]
"""Which ranks cut tensors among themselves."""


class EngineParams(Params):
    """What every engine is set by."""

    grad_dtype: GradDtype = "auto"
    """Sums of a bf16 model's gradients, over the micro-batches of a step and over ranks: auto = float32, kept only
    where a step has several micro-batches; float32 = always kept; bfloat16 = 2 bytes a trained weight less, with an
    error that grows with the number of micro-batches."""


class AutoParams(EngineParams):
    """For `auto`, which picks an engine that can offload when asked to."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in host memory: nothing, the optimizer's state, or that and the parameters."""


class Zero12Params(EngineParams):
    """ZeRO stages 1 and 2, which keep whole parameters on every rank."""

    offload: Literal["none", "optimizer"] = "none"
    """What lives in host memory: nothing, or the optimizer's state and master weights."""


class Zero3Params(EngineParams):
    """ZeRO stage 3."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in host memory: nothing, the optimizer's state and master weights, or those and the parameters."""
    shard_within: ShardWithin = "world"
    """node (or a number of ranks): keep a second copy of the weights cut within it, so that the backward pass gathers
    inside the node (hpZ); state stays cut over all."""


class Fsdp2Params(EngineParams):
    """Fully sharded data parallel."""

    offload: Literal["none", "all"] = "none"
    """`all` keeps parameters, gradients and optimizer state in host memory."""
    shard_within: ShardWithin = "world"
    """node (or a number of ranks): cut everything within it, repeat it over the nodes (HSDP); only gradients cross."""
    gather: Literal["each_pass", "once_a_step"] = "each_pass"
    """once_a_step: weights stay whole and gradients unreduced over all micro-batches of a step: memory for traffic."""
