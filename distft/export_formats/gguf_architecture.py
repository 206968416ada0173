"""A transformers config as llama.cpp's metadata, and what of its tensors changes on the way.

One table of families. A family lists every config key that changes what the model computes; a key that it does not list
and that is not without effect is refused, because llama.cpp would compute without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distft.core.errors import DataError

_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers that llama.cpp computes alike."""

    arch: str
    """llama.cpp's name (`gguf.MODEL_ARCH_NAMES`)."""
    activations: tuple[str, ...] = ("silu",)
    permutes: bool = False
    """llama.cpp rotates neighbouring pairs of q and k where transformers rotates halves: rows change places."""
    norm_offset: float = 0.0
    """Added to the weight of every RMS norm: Gemma's multiply by 1 + weight."""
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Config keys -> the one value with which llama.cpp computes the same; a key that is absent has that value."""
    sliding: bool = False
    """llama.cpp knows this family's sliding windows, in the pattern of `swa_period`."""
    swa_period: int = 0
    """Every so many layers, the last one attends to everything."""
    softcaps: bool = False
    heads_fill_width: bool = False
    """llama.cpp takes hidden_size / heads for the width of a head, whatever head_dim says."""


FAMILIES: dict[str, Family] = {
    "llama": Family(arch="llama", permutes=True, fixed={"pretraining_tp": 1}),
    "mistral": Family(arch="llama", permutes=True),
    "qwen2": Family(arch="qwen2", heads_fill_width=True),
    "qwen3": Family(arch="qwen3", fixed={"attention_bias": False}),
    "gemma": Family(arch="gemma", activations=_GELU_TANH, norm_offset=1.0, fixed={"attention_bias": False}),
    "gemma2": Family(
        arch="gemma2",
        activations=_GELU_TANH,
        norm_offset=1.0,
        fixed={"attention_bias": False},
        sliding=True,
        swa_period=2,
        softcaps=True,
    ),
    "gemma3_text": Family(
        arch="gemma3",
        activations=_GELU_TANH,
        norm_offset=1.0,
        fixed={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        sliding=True,
        swa_period=6,
    ),
}
"""transformers' `model_type` -> how llama.cpp computes it."""

Metadata = list[tuple[str, tuple[Any, ...]]]
"""(method of `gguf.GGUFWriter`, its arguments), in order."""


def family_of(config: Any) -> Family:
    """Return the family of a config.

    Raises:
        DataError: llama.cpp does not know such a model, or computes this one otherwise.
    """
    name = config.model_type
    family = FAMILIES.get(name)
    if family is None:
        raise DataError(
            f'config.json: model_type "{name}" is a model that llama.cpp does not know, or that this project does not '
            f"write for it  allowed: {', '.join(FAMILIES)}  fix: export it as safetensors"
        )
    architectures = config.architectures or []
    if architectures and not any(one.endswith("ForCausalLM") for one in architectures):
        raise DataError(
            f"config.json: {', '.join(architectures)} writes no text, and llama.cpp would load it as if it did  "
            "allowed: a causal language model (…ForCausalLM)  fix: export a reward model as safetensors"
        )
    for problem in _misfits(config, family):
        raise DataError(f"config.json: {problem}  fix: export it as safetensors")
    return family


def _misfits(config: Any, family: Family) -> Iterator[str]:
    """Yield what llama.cpp would compute otherwise, or leave out."""
    kind = config.model_type
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in family.activations:
        yield f'activation "{activation}" is none of llama.cpp\'s {kind}  allowed: {", ".join(family.activations)}'
    for key, value in family.fixed.items():
        if getattr(config, key, value) not in (value, None):
            yield f"{key} = {getattr(config, key)!r} is none of llama.cpp's {kind}  allowed: {value!r}"
    head_dim = getattr(config, "head_dim", None)
    if family.heads_fill_width and head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        width = config.hidden_size // config.num_attention_heads
        yield f"head_dim = {head_dim} is not computed by llama.cpp's {kind}  allowed: {width}, hidden_size / heads"
    window = getattr(config, "sliding_window", None)
    if not family.sliding and window is not None and _uses_window(config):
        yield f"sliding_window = {window} is not computed by llama.cpp's {kind}  allowed: attention to everything"
    if family.sliding:
        wanted = _layer_types(config.num_hidden_layers, family.swa_period)
        if list(config.layer_types) != wanted:
            yield f"layer_types are not llama.cpp's, where every {family.swa_period}th layer attends to everything"
    yield from _rope_misfits(config, family)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        yield f"query_pre_attn_scalar = {scalar} is not llama.cpp's  allowed: {config.head_dim}, the head_dim"
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        yield "the weights are quantised already, and would be rounded twice: merge into the base that is not"


def _uses_window(config: Any) -> bool:
    """Return whether a layer looks through the window: Qwen's configs name one that is off."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "use_sliding_window", True)
    return "sliding_attention" in types


def _layer_types(count: int, period: int) -> list[str]:
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(count)]


def rope_of(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotation of layers that attend to everything, and of those with a window."""
    given = dict(config.rope_parameters)
    if "full_attention" in given:
        return dict(given["full_attention"]), dict(given.get("sliding_attention") or given["full_attention"])
    return given, given


def _rope_misfits(config: Any, family: Family) -> Iterator[str]:
    whole, window = rope_of(config)
    allowed = ("default", "linear", "llama3") if family.arch == "llama" else ("default", "linear")
    if (kind := whole.get("rope_type", "default")) not in allowed:
        yield f'rope_type "{kind}" is not written for llama.cpp  allowed: {", ".join(allowed)}'
    if whole.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor = {whole['partial_rotary_factor']} is not written for llama.cpp  allowed: 1.0"
    if family.arch == "gemma3" and (window.get("rope_type"), window["rope_theta"]) != ("default", 10000.0):
        yield f"the rotation of layers with a window is {window}, and llama.cpp's is default with rope_theta 10000"


def metadata(config: Any, family: Family) -> Metadata:
    """Return what the file says of the model's shape."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    whole, _ = rope_of(config)
    made: Metadata = [
        ("add_context_length", (config.max_position_embeddings,)),
        ("add_embedding_length", (config.hidden_size,)),
        ("add_block_count", (config.num_hidden_layers,)),
        ("add_feed_forward_length", (config.intermediate_size,)),
        ("add_head_count", (heads,)),
        ("add_head_count_kv", (kv_heads,)),
        ("add_key_length", (head_dim,)),
        ("add_value_length", (head_dim,)),
        ("add_layer_norm_rms_eps", (config.rms_norm_eps,)),
        ("add_rope_freq_base", (float(whole["rope_theta"]),)),
        ("add_vocab_size", (config.vocab_size,)),
    ]
    if family.arch == "llama":
        made.append(("add_rope_dimension_count", (head_dim,)))
    if whole.get("rope_type") == "linear":
        from gguf import RopeScalingType

        made += [
            ("add_rope_scaling_type", (RopeScalingType.LINEAR,)),
            ("add_rope_scaling_factor", (float(whole["factor"]),)),
        ]
    if family.sliding:
        made.append(("add_sliding_window", (config.sliding_window,)))
    if family.softcaps:
        made += [
            ("add_attn_logit_softcapping", (config.attn_logit_softcapping,)),
            ("add_final_logit_softcapping", (config.final_logit_softcapping,)),
        ]
    return made


def rope_factors(config: Any) -> Tensor | None:
    """Return what each frequency is divided by under Llama 3's rule, fp32 [head_dim / 2]; None under other rules.

    ModelSource: `_compute_llama3_parameters` of transformers.
    """
    whole, _ = rope_of(config)
    if whole.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * whole["rope_theta"] ** exponents
    context, factor = whole["original_max_position_embeddings"], whole["factor"]
    low, high = whole["low_freq_factor"], whole["high_freq_factor"]
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divided = torch.where(wavelengths > context / low, torch.full_like(wavelengths, factor), between)
    return torch.where(wavelengths < context / high, torch.ones_like(wavelengths), divided).float()


def converter(config: Any, family: Family) -> Callable[[str, Tensor], Tensor]:
    """Return the change of a tensor, by its name in transformers' file."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        if family.permutes and ".q_proj." in name:
            return permuted(tensor, config.num_attention_heads)
        if family.permutes and ".k_proj." in name:
            return permuted(tensor, config.num_key_value_heads)
        if family.norm_offset and name.endswith("norm.weight"):
            return tensor.float() + family.norm_offset
        return tensor

    return convert


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Return rows [heads x (2 halves x pairs)] as [heads x (pairs x 2)]."""
    rest = tensor.shape[1:]
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(tensor.shape)
