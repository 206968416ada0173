"""Prefix tuning: keys and values of virtual tokens before every document, in every layer's attention.

The virtual tokens stand in the sequence, where positions count them; in each layer what attention would read there is
replaced by what is trained, so that documents laid end to end have each their own prefix, and what is computed at the
virtual positions themselves is read by nobody.
Source: https://arxiv.org/abs/2101.00190
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from distft.core.errors import Problem, RecipeError
from distft.model.adapters import prompts
from distft.model.adapters.spec import MethodSpec
from distft.model.adapters.sublayers import attention_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn


class PrefixTuningParams(prompts.PromptParams):
    """PEFT's names."""

    prefix_projection: bool = False
    """Make keys and values from one embedding by a network of two layers, which is left out when it is saved."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width between the two layers; the width of a layer's keys where it is not given."""
    init: Literal["random", "zero"] = "random"
    """What keys and values start as, or the layer that makes them: PEFT's noise, or zeros."""

    @model_validator(mode="after")
    def _hidden_where_it_is_used(self) -> Self:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is of the network of prefix_projection = true")
        if self.start is not None and self.prefix_projection:
            raise ValueError("start: a saved prefix holds keys and values, not the network of prefix_projection")
        return self


def _attach(lm: Any, params: PrefixTuningParams, dtype: torch.dtype) -> nn.Module:
    from distft.model.adapters.virtual_tokens import EmptyEmbedding, KeyValuePrefix, PrefixEncoder
    from distft.model.attention import let_take_prefixes
    from distft.model.attention_shape import attention_shapes
    from distft.model.blocks import blocks_of

    prompts.refuse_scores(lm)
    lm.requires_grad_(False)
    let_take_prefixes()
    layers = [attention_of(lm, block, "prefix_tuning") for block in blocks_of(lm)]
    shapes = attention_shapes(lm.config)
    if len({(shape.kv_heads, shape.head_dim) for shape in shapes}) != 1 or len(shapes) != len(layers):
        raise _mistake(lm, "has layers whose attention differs in its heads, or that have none")
    if getattr(lm.config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise _mistake(lm, "makes its keys and values of latent ones")
    if getattr(lm.config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise _mistake(lm, "has layers that read the keys of others")
    count, shape = params.num_virtual_tokens, shapes[0]
    width = shape.kv_heads * shape.head_dim
    hidden = (params.encoder_hidden_size or width) if params.prefix_projection else None
    for layer in layers:
        prefix = KeyValuePrefix(count, shape.kv_heads, shape.head_dim, hidden, dtype)
        prefix.starts_at_zero = params.init == "zero"
        layer.kv_prefix = prefix
    if hidden is not None:
        lm.prefix_encoder = PrefixEncoder(count, width, hidden, dtype)
    lm.set_input_embeddings(EmptyEmbedding(lm.get_input_embeddings()))
    return lm


def _mistake(lm: Any, message: str) -> RecipeError:
    problem = Problem(message=f"[method] prefix_tuning: {type(lm).__name__} {message}",
                      fix='use name = "prompt_tuning", which any model can have')  # fmt: skip
    return RecipeError("recipe", [problem])


def _owns(name: str) -> bool:
    return ".kv_prefix." in name or "prefix_encoder." in name


def _fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Draw what torch's embedding and linear layers start as, which are PEFT's."""
    import torch

    value, module = torch.empty(meta.shape), model.get_submodule(name.rpartition(".")[0])
    in_layer = ".kv_prefix." in name
    if in_layer and module.starts_at_zero:
        return value.zero_()
    is_projected = not in_layer or module.bias is not None
    if not is_projected or name.startswith("prefix_encoder.embedding."):
        return value.normal_(generator=generator)
    weight: Any = module.weight
    bound = weight.shape[1] ** -0.5  # of a linear layer, for its weight as for its bias
    return value.uniform_(-bound, bound, generator=generator)


def _save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save all layers' keys and values as PEFT lays them out: a row for each virtual token."""
    import torch
    import torch.nn.functional as F
    from peft import PrefixTuningConfig

    from distft.model.attention_shape import attention_shapes

    shape = attention_shapes(lm.config)[0]
    weights = [tensor for name, tensor in tensors.items() if name.endswith(".kv_prefix.weight")]
    config = PrefixTuningConfig(token_dim=shape.kv_heads * shape.head_dim, num_attention_heads=shape.kv_heads)
    encoder = {name.removeprefix("prefix_encoder."): tensor for name, tensor in tensors.items() if "encoder." in name}
    if encoder:
        config.prefix_projection, config.encoder_hidden_size = True, encoder["project.weight"].shape[0]
        biases = [tensor for name, tensor in tensors.items() if name.endswith(".kv_prefix.bias")]
        projected = F.linear(encoder["embedding.weight"], encoder["project.weight"], encoder["project.bias"])
        weights = [F.linear(torch.tanh(projected), *pair) for pair in zip(weights, biases, strict=True)]
    config.num_virtual_tokens = weights[0].shape[0]
    prompts.save_prompt(lm, folder, config, torch.cat(weights, dim=1))


def _stored(weights: Any, name: str, meta: Tensor) -> Tensor | None:
    """Return a layer's columns of the saved prefix; what a projection was made of is not saved."""
    prompt = prompts.stored_prompt(weights, name, meta)
    layer = re.search(r"\.(\d+)\.", name)
    if prompt is None or layer is None or not name.endswith(".kv_prefix.weight"):
        return None
    first = int(layer[1]) * meta.shape[1]
    return prompt[:, first : first + meta.shape[1]].clone()


SPEC = MethodSpec(
    name="prefix_tuning",
    title="Prefix tuning",
    params=PrefixTuningParams,
    attach=_attach,
    owns=_owns,
    fresh=_fresh,
    base_name=prompts.base_name,
    adapter=True,
    virtual_tokens=prompts.virtual_tokens,
    save_adapter=_save,
    stored=_stored,
    library="peft",
)
