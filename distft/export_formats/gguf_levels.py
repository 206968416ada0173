"""How exactly a GGUF file stores each tensor, by level: llama.cpp's own choice of types, tensor by tensor.

K levels give more bits to the tensors that lose most. The rules are llama.cpp's (`llama_tensor_get_type_impl` of
src/llama-quant.cpp, for dense models), and tensors are equal to those of its own tool bit for bit
(`tests/unit/export_formats/test_k_levels.py`). One thing differs: a row that is no multiple of a type's block is
refused here, where llama.cpp stores it as another type and says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"blk\.(\d+)\.")
_LAYERS_OF_70B = 80
"""llama.cpp takes a Llama or Qwen2 of so many layers for a 70B, and gives its values more bits."""


@dataclass(frozen=True, kw_only=True)
class GgufLevel:
    """How exactly the matrices are stored; vectors are fp32 at every level."""

    name: str
    quant: str
    """`gguf.GGMLQuantizationType` of the matrices, or of most of them."""
    file_type: str
    """`gguf.LlamaFileType`."""
    block: int
    """Rows are stored in blocks of so many numbers; a row that is no multiple of it cannot be."""

    @property
    def is_mixed(self) -> bool:
        """Whether some tensors get more bits than others, and an importance matrix is taken."""
        return self.quant.endswith("_K")


LEVELS = {
    level.name: level
    for level in (
        GgufLevel(name="F32", quant="F32", file_type="ALL_F32", block=1),
        GgufLevel(name="F16", quant="F16", file_type="MOSTLY_F16", block=1),
        GgufLevel(name="BF16", quant="BF16", file_type="MOSTLY_BF16", block=1),
        GgufLevel(name="Q8_0", quant="Q8_0", file_type="MOSTLY_Q8_0", block=32),
        GgufLevel(name="Q6_K", quant="Q6_K", file_type="MOSTLY_Q6_K", block=256),
        GgufLevel(name="Q5_1", quant="Q5_1", file_type="MOSTLY_Q5_1", block=32),
        GgufLevel(name="Q5_K_M", quant="Q5_K", file_type="MOSTLY_Q5_K_M", block=256),
        GgufLevel(name="Q4_K_M", quant="Q4_K", file_type="MOSTLY_Q4_K_M", block=256),
        GgufLevel(name="Q4_0", quant="Q4_0", file_type="MOSTLY_Q4_0", block=32),
        GgufLevel(name="Q3_K_M", quant="Q3_K", file_type="MOSTLY_Q3_K_M", block=256),
        GgufLevel(name="Q2_K", quant="Q2_K", file_type="MOSTLY_Q2_K", block=256),
    )
}
"""Every level, most exact first."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the choice of types depends on besides a tensor's name."""

    arch: str
    num_layers: int
    queries_per_key: int
    """Heads that share a key and value head."""
    tied: bool
    """Whether the embedding is the head as well."""


def tensor_type(level: GgufLevel, target: str, num_dims: int, shape: ModelShape) -> str:
    """Return the `gguf.GGMLQuantizationType` of a tensor, by its name in the file."""
    if num_dims < 2:
        return "F32"
    if not level.is_mixed:
        return level.quant
    if target == "output.weight" or (shape.tied and target == "token_embd.weight"):
        return "Q6_K"
    found = _LAYER.match(target)
    if found is None:
        return level.quant
    layer, part = int(found[1]), target[found.end() :].removesuffix(".weight")
    if part == "attn_v":
        quant = _of_values(level, layer, shape)
        is_70b = shape.num_layers == _LAYERS_OF_70B and shape.arch in ("llama", "qwen2")
        return "Q5_K" if is_70b and quant in ("Q3_K", "Q4_K") else quant
    if part == "ffn_down":
        return _of_down(level, layer, shape.num_layers)
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(level.name, level.quant)
    return level.quant


def _of_values(level: GgufLevel, layer: int, shape: ModelShape) -> str:
    if level.name == "Q2_K":
        return "Q4_K" if shape.queries_per_key >= 4 else "Q3_K"
    if level.name == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if level.name in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, shape.num_layers):
        return "Q6_K"
    return level.quant


def _of_down(level: GgufLevel, layer: int, num_layers: int) -> str:
    if level.name == "Q2_K":
        return "Q3_K"
    if level.name == "Q3_K_M":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    if level.name in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, num_layers):
        return "Q6_K"
    return level.quant


def _gets_more(layer: int, num_layers: int) -> bool:
    """Return whether a layer is among the first and last eighth, or every third between (`use_more_bits`)."""
    first = num_layers // 8
    return layer < first or layer >= 7 * num_layers // 8 or (layer - first) % 3 == 2
