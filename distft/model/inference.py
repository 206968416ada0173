"""Switches a model between training and generation: attention with padding masks, and the key-value cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from distft.model.attention_shape import attention_shapes
from distft.model.causal import CausalLM


@contextlib.contextmanager
def generation_mode(module: CausalLM) -> Iterator[None]:
    """Let attention take padding masks and a cache, and run compiled blocks uncompiled, inside the context.

    Every answer has another length: compiled blocks would be compiled anew at each.
    """
    configs = [module.transformer.config, module.transformer.config.get_text_config(decoder=True)]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = module.path.generation_attention
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def new_cache(module: CausalLM, most: float = math.inf) -> Any:
    """Return an empty key-value cache of the kind that the architecture wants, for at most `most` positions."""
    from transformers import DynamicCache

    from distft.model.growing_cache import use_growing_layers

    return use_growing_layers(DynamicCache(config=module.transformer.config), most)


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return what one token of one row takes in the cache, in every layer."""
    return sum(2 * shape.kv_heads * shape.head_dim for shape in attention_shapes(config)) * dtype.itemsize


def longest_text(config: Any) -> int | None:
    """Return the positions that the model can read; None when its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
