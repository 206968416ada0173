"""Applies activation checkpointing and compilation to the blocks of a model."""

from __future__ import annotations

import types
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distft.model.adapters import products

Checkpointing = Literal["off", "selective", "full"]

_ATTENTION = frozenset(
    op
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
    if (op := getattr(torch.ops.aten, name, None)) is not None
)
_BY_NAME = ("varlen_attn", "flash_attn", "flex_attention")
"""Parts of the names of attentions that are no operators of aten: torch's varlen, the flash-attn packages', Flex."""
_MATMULS = frozenset({torch.ops.aten.mm, torch.ops.aten.addmm})


class _KeepHalf:
    """Policy: keep attention outputs and every second matrix product, recompute the rest.

    The products of a block cost alike in memory and time; half of them is torchtitan's default trade.
    Source: https://pytorch.org/blog/activation-checkpointing-techniques/
    """

    def __init__(self) -> None:
        self._products = {False: 0, True: 0}

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = getattr(op, "overloadpacket", op)
        keep = packet in _ATTENTION or any(name in str(packet) for name in _BY_NAME)
        if packet in _MATMULS:
            self._products[ctx.is_recompute] += 1
            keep = self._products[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def choose_checkpointing(wanted: str, planned: str | None, why: str) -> tuple[Checkpointing, str]:
    """Return (mode, reason) for `activation_checkpointing`; `planned` is the planner's choice for `auto`."""
    if wanted != "auto":
        return wanted, "the recipe says so"  # type: ignore[return-value]
    if planned is None:
        return "off", "no accelerator whose memory could run out"
    return planned, why  # type: ignore[return-value]


def checkpoint_blocks(transformer: Any, mode: Checkpointing) -> None:
    """Recompute activations of every block in the backward pass; `off` leaves all of them."""
    products.write_in_place(transformer, mode != "selective")  # which keeps products, so nobody may write onto them
    if mode == "off":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if mode == "selective":
        kwargs["context_fn"] = lambda: create_selective_checkpoint_contexts(_KeepHalf())
    transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each block's forward: hooks of engines stay outside, and equal blocks share one compilation.

    Call it when the engine has wrapped the blocks. `fully_shard` gives a block another class, whose forward
    transformers wraps for checkpointing, and only the outermost wrapper checkpoints: compiled before, the block would
    keep all its activations.
    """
    # Else each block's graph is cut where one of DDP's buckets ends, for an overlap that blocks give anyway.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.forward = torch.compile(types.MethodType(type(block).forward, block))


__all__ = ["Checkpointing", "checkpoint_blocks", "compile_blocks"]
