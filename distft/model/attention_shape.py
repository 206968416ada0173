"""What formulas ask of a config about attention, for every architecture: heads and their sizes, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Heads x size of a head."""
        return self.heads * self.head_dim


def attention_shapes(config: Any) -> list[AttentionShape]:
    """Return the shape of every layer that attends; layers of a recurrence or a convolution are left out.

    A layer counts as attending unless `layer_types` (or `layers_block_type`) names it without "attention", or with
    "linear". Layers may differ in their heads (Gemma 4).
    """
    text = config.get_text_config(decoder=True)
    kinds: Sequence[str] | None = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    layers = [text] * text.num_hidden_layers
    if getattr(text, "is_heterogeneous", False):
        layers = list(text.per_layer_config[: text.num_hidden_layers])
    shapes = []
    for index, layer in enumerate(layers):
        attends = kinds is None or index >= len(kinds) or ("attention" in kinds[index] and "linear" not in kinds[index])
        if attends and (shape := _shape(layer)) is not None:
            shapes.append(shape)
    return shapes


def largest_attention(config: Any) -> AttentionShape:
    """Return the widest attention of any layer; of width 0 where none attends."""
    shapes = attention_shapes(config)
    return max(shapes, key=lambda shape: shape.width, default=AttentionShape(heads=0, kv_heads=0, head_dim=0))


def _shape(layer: Any) -> AttentionShape | None:
    heads = getattr(layer, "num_attention_heads", None)
    if not isinstance(heads, int) or heads == 0:
        return None
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def head_size(config: Any) -> int:
    """Return the size of a query head of a config's text model, the largest of its layers; 0 where it does not say."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # then the config itself refuses to say (Gemma 4)
        return max(head_size(layer) for layer in text.per_layer_config)
    latent = (getattr(text, "qk_nope_head_dim", None) or 0) + (getattr(text, "qk_rope_head_dim", None) or 0)
    size = latent or getattr(text, "head_dim", None)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if isinstance(size, int) and size:
        return size
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0
