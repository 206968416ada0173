"""A small copy of a model's config: every kind of block and every rule of its arithmetic, at widths of a few dozen.

Sizes that say how far a token sees (windows, chunks, positions that a rope was trained for) keep their relation to the
run's longest document: what a document of the run exceeds, a probe of the proof exceeds too. What no document exceeds
the packed probes do, as packed rows may.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PROBE_LENGTHS = (23, 11, 5)
"""Tokens of the documents that a proof compares; the longest is longer than every size in `_short_of`."""
VOCABULARY = 96
MAX_BLOCKS = 8
"""Blocks whose kinds repeat later than this are not looked for."""
SMALL_HIDDEN = 128
"""Models up to this hidden size keep their widths."""

_SIGHT = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "local_attention_window_len",
    "keep_window_size",
    "attention_chunk_size",
    "floor_scale",
    "original_max_position_embeddings",
    "index_topk",
    "log_scaling_n_floor",
    "rel_extent",
)
"""Sizes in tokens that change what a position sees, once a document is longer."""
_CHUNKS = ("chunk_size", "mamba_chunk_size", "block_size", "index_block_size")
"""Tokens that a kernel takes at a time; results do not depend on them, but code paths do."""
_SHORT, _LONG = 4, 32
"""Tokens that a probe exceeds; tokens that no probe exceeds, but that all of them laid end to end do: what counts along
the row instead of along the document shows."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """What a small copy changes; tried from the smallest to the one that only drops blocks and vocabulary."""

    widths: bool
    experts: bool


LEVELS = (
    Level(widths=True, experts=True),
    Level(widths=False, experts=True),
    Level(widths=False, experts=False),
)


def small_copies(config: Any, *, depth: int, max_length: int) -> Iterator[Any]:
    """Yield copies of `config`, the smallest first; a copy may turn out not to be a valid model.

    Args:
        config: a transformers config; it is not changed.
        depth: number of blocks to keep (see `distinct_depth`).
        max_length: tokens in the run's longest document.
    """
    for level in LEVELS:
        small = copy.deepcopy(config)
        text = small.get_text_config(decoder=True)
        if text is not small and all(part is not text for part in vars(small).values()):
            text = small  # a decoder that shares one config with its encoder: what was given is a copy
        _shorten(text, depth)
        _shorten_towers(small, text)
        _limit_sight(text, max_length)
        if level.widths and _get(text, "hidden_size", 0) > SMALL_HIDDEN:
            _narrow(text)
        if level.experts:
            _fewer_experts(text)
        _small_vocabulary(small, text)
        yield small


def distinct_depth(blocks: list[Any], *, times: int = 1) -> int:
    """Return the length of the shortest prefix of `blocks` that holds every kind of block, at most `times` MAX_BLOCKS.

    Two blocks are of one kind when their modules have the same classes, plain attributes and parameter shapes.

    Args:
        blocks: of the whole model.
        times: blocks of each kind, where there are so many; two where blocks of one kind share weights.
    """
    most = times * MAX_BLOCKS
    seen: dict[Any, int] = {}
    depth = 1
    for index, block in enumerate(blocks[: 4 * MAX_BLOCKS]):
        kind = _kind(block)
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= times:
            depth = index + 1
    return max(min(depth, most), min(2, len(blocks)))


def _kind(block: Any) -> tuple[Any, ...]:
    facts: list[Any] = []
    for name, module in block.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and "layer_idx" not in key and not key.startswith("_")
        )
        shapes = tuple((key, tuple(param.shape)) for key, param in module._parameters.items() if param is not None)
        facts.append((name, type(module).__name__, plain, shapes))
    return tuple(facts)


def _get(text: Any, name: str, default: Any = None) -> Any:
    try:
        value = getattr(text, name, default)
    except (AttributeError, RuntimeError):  # layers differ in it, so it has no one value
        value = None
    return default if value is None else value


def _set(text: Any, name: str, value: Any) -> None:
    """Set an attribute that the config has; one that follows from others cannot be set."""
    if _get(text, name) is not None:
        with contextlib.suppress(AttributeError, NotImplementedError):
            setattr(text, name, value)


def _shorten(text: Any, depth: int) -> None:
    whole = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole and whole > depth:
            setattr(text, key, type(value)(value[:depth]))
    shared = _get(text, "num_kv_shared_layers", 0)
    if isinstance(shared, int) and shared > 0:
        text.num_kv_shared_layers = min(whole, depth) if shared == whole else max(1, depth // 3)
    _set(text, "num_hidden_layers", min(whole, depth))
    stack = _get(text, "num_layers_per_stack")  # HRM: a stack is passed several times, and each pass counts
    if isinstance(stack, int):
        text.num_layers_per_stack = min(stack, depth)
        text.num_hidden_layers = whole // stack * text.num_layers_per_stack
    if getattr(text, "is_heterogeneous", False):  # what single layers override
        overrides = text._heterogeneity_spec.per_layer_overrides
        for layer in [index for index in overrides if index >= depth]:
            del overrides[layer]
    for name in ("decoder_layers", "num_decoder_layers"):
        if isinstance(_get(text, name), int):
            setattr(text, name, min(getattr(text, name), depth))
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"):
        _set(text, name, 0)


def _shorten_towers(config: Any, text: Any) -> None:
    """Leave one block to whatever reads images or sound beside the text: no text passes through it."""
    for part in vars(config).values():
        if part is text or not hasattr(part, "to_json_string"):
            continue
        for name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_global_layers", "num_blocks"):
            _set(part, name, 1)
        for name, value in list(vars(part).items()):
            if name.endswith(("_indexes", "_indices", "_layers")) and isinstance(value, list):
                setattr(part, name, [0])


def _limit_sight(text: Any, max_length: int) -> None:
    for name in _SIGHT:
        value = _get(text, name)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(text, name, _SHORT if value < max_length else _LONG)
    for name in _CHUNKS:
        value = _get(text, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 8:
            setattr(text, name, 8)
    rope = _get(text, "rope_parameters")
    positions = _get(text, "max_position_embeddings")
    if isinstance(positions, int):  # a table of learned positions cannot be exceeded, a rope can
        _set(text, "max_position_embeddings", 2 * _SHORT if rope and positions < max_length else _LONG)
    for table in _ropes(rope):
        trained = table.get("original_max_position_embeddings")
        if isinstance(trained, (int, float)):
            table["original_max_position_embeddings"] = 2 * _SHORT if trained < max_length else _LONG


def _ropes(rope: Any) -> Iterator[dict[str, Any]]:
    """Yield the rope tables of a config: one, or one for each type of layer."""
    if isinstance(rope, dict):
        if "rope_type" in rope:
            yield rope
        else:
            yield from (table for table in rope.values() if isinstance(table, dict))


def _narrow(text: Any) -> None:
    """Give attention 2 or 4 heads and the widths that follow; relations between them stay."""
    hidden, heads = text.hidden_size, _get(text, "num_attention_heads", 1)
    kv = _get(text, "num_key_value_heads", heads)
    by_heads = isinstance(heads, int) and hidden % heads == 0
    head_dim = _get(text, "head_dim", hidden // heads if by_heads else 0)
    if not isinstance(kv, int) or not isinstance(heads, int):
        kv = heads = 4
    kv_small = 1 if kv == 1 else 2
    heads_small = kv_small * min(2, max(1, heads // kv)) if kv != heads else 2
    if kv == 1 and heads > 1:
        heads_small = 2
    dim_small = min(16, head_dim) if head_dim else 16
    hidden_small = heads_small * dim_small if not head_dim or heads * head_dim == hidden else 48
    text.hidden_size = hidden_small
    for name, value in (
        ("num_attention_heads", heads_small),
        ("num_key_value_heads", kv_small),
        ("head_dim", dim_small),
        ("decoder_attention_heads", heads_small),
        ("encoder_attention_heads", heads_small),
    ):
        _set(text, name, value)
    if isinstance(_get(text, "attention_head_dim"), int):  # Zamba: attention over the hidden state and the embedding
        wide = text.attention_hidden_size // hidden * hidden_small
        text.attention_hidden_size, text.attention_head_dim = wide, wide // heads_small
    for name in ("word_embed_proj_dim", "embedding_size", "embedding_dim", "attention_hidden_size"):
        if _get(text, name) == hidden:
            setattr(text, name, hidden_small)
    for name in _INNER:
        if isinstance(_get(text, name), int) and _get(text, name) > 32:
            setattr(text, name, 32)
    _narrow_ropes(text, head_dim, dim_small)
    _narrow_latent_attention(text)
    _narrow_recurrence(text, hidden_small)


_INNER = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "n_inner",
    "ffn_dim",
    "decoder_ffn_dim",
    "dense_intermediate_size",
    "block_ff_dim",
    "lru_width",
)
"""Widths inside a block that nothing else depends on."""


def _narrow_ropes(text: Any, before: int, after: int) -> None:
    rotary = _get(text, "rotary_dim")
    if isinstance(rotary, int) and before:
        text.rotary_dim = max(2, rotary * after // before // 2 * 2)
    for table in _ropes(_get(text, "rope_parameters")):
        for key in ("short_factor", "long_factor"):
            if isinstance(table.get(key), list) and before:
                half = int(after * table.get("partial_rotary_factor", 1.0)) // 2
                table[key] = table[key][:half]
        section = table.get("mrope_section")
        if isinstance(section, list) and before:
            half = int(after * table.get("partial_rotary_factor", 1.0)) // 2
            rest = half - 2 * (half // len(section))
            table["mrope_section"] = [rest, *[half // len(section)] * (len(section) - 1)]


def _narrow_latent_attention(text: Any) -> None:
    """Narrow multi-head latent attention (DeepSeek): low-rank queries and keys, a rotary part beside."""
    if not isinstance(_get(text, "qk_rope_head_dim"), int):
        return
    rope, rest = 8, 8
    _set(text, "qk_rope_head_dim", rope)
    _set(text, "qk_nope_head_dim", rest)
    _set(text, "qk_head_dim", rope + rest)
    _set(text, "v_head_dim", 8)
    _set(text, "kv_lora_rank", 16)
    _set(text, "q_lora_rank", 16)
    _set(text, "index_head_dim", 16)
    _set(text, "index_n_heads", 2)
    _set(text, "num_key_value_heads", text.num_attention_heads)
    _set(text, "head_dim", rope)


def _narrow_recurrence(text: Any, hidden: int) -> None:
    """Narrow state-space and linear-attention blocks: heads x size of a head = expansion x hidden."""
    expand = _get(text, "mamba_expand", _get(text, "expand", 2))
    inner = int(expand * hidden)
    if isinstance(_get(text, "mamba_n_heads"), int):
        _set(text, "mamba_d_head", 8)
        _set(text, "mamba_n_heads", inner // 8)
        _set(text, "mamba_d_ssm", inner)
    if isinstance(_get(text, "mamba_num_heads"), int):
        _set(text, "mamba_head_dim", 8)
        _set(text, "mamba_num_heads", inner // 8)
    for name in ("mamba_d_state", "ssm_state_size", "state_size"):
        _set(text, name, 8)
    for name in ("mamba_n_groups", "n_groups"):
        if isinstance(_get(text, name), int):
            setattr(text, name, min(2, getattr(text, name)))
    for name in ("mamba_dt_rank", "time_step_rank"):
        if isinstance(_get(text, name), int):
            setattr(text, name, 4)
    keys, values = _get(text, "linear_num_key_heads"), _get(text, "linear_num_value_heads")
    if isinstance(keys, int) and isinstance(values, int):
        text.linear_num_key_heads = 2
        text.linear_num_value_heads = 2 * min(2, max(1, values // keys))
    for name in ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"):
        _set(text, name, 8)
    if isinstance(_get(text, "linear_num_heads"), int):
        text.linear_num_heads = 2


def _fewer_experts(text: Any) -> None:
    """Keep four experts (eight in groups), the best two of them used."""
    groups = 1
    for name in ("n_group", "num_expert_group"):
        if isinstance(_get(text, name), int):
            groups = min(2, getattr(text, name))
            setattr(text, name, groups)
    if isinstance(_get(text, "topk_group"), int):
        text.topk_group = min(groups, text.topk_group)
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(_get(text, name), int) and getattr(text, name) > 4:
            setattr(text, name, 4 * groups)
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"):
        if isinstance(_get(text, name), int) and getattr(text, name) > 2:
            setattr(text, name, 2)
    _set(text, "zero_expert_num", 2)


def _small_vocabulary(config: Any, text: Any) -> None:
    for part in {id(config): config, id(text): text}.values():
        for name in ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"):
            value = _get(part, name)
            if isinstance(value, int) and value > VOCABULARY:
                setattr(part, name, VOCABULARY)
        if isinstance(_get(part, "unpadded_vocab_size"), int):
            part.unpadded_vocab_size = VOCABULARY - 6
        for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
            if getattr(part, name, None) is not None:
                setattr(part, name, token)
        for name in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index"):
            if isinstance(_get(part, name), int):
                setattr(part, name, VOCABULARY - 1)
