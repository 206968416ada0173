"""P-tuning: virtual tokens before every document, whose embeddings a small network makes (PEFT).

The network is trained with its own embeddings; what is saved is what it makes of them.
Source: https://arxiv.org/abs/2103.10385
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from distft.model.adapters import prompts
from distft.model.adapters.peft_tuner import keep_starts, start_of
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn


class PTuningParams(prompts.PromptParams):
    """PEFT's names."""

    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the network's two hidden layers; the model's own where it is not given."""

    @model_validator(mode="after")
    def _starts_anew(self) -> Self:
        if self.start is not None:
            raise ValueError('start: what is saved is not the network; go on with name = "prompt_tuning"')
        return self


def _encoder(count: int, width: int, hidden: int) -> tuple[Any, Any]:
    """Return PEFT's network and its config."""
    from peft import PromptEncoder, PromptEncoderConfig

    config = PromptEncoderConfig(num_virtual_tokens=count, token_dim=width, encoder_hidden_size=hidden)
    config.num_transformer_submodules = 1
    return PromptEncoder(config), config


def _attach(lm: Any, params: PTuningParams, dtype: torch.dtype) -> nn.Module:
    from distft.model.adapters.virtual_tokens import EncodedEmbedding

    prompts.refuse_scores(lm)
    lm.requires_grad_(False)
    base = lm.get_input_embeddings()
    width = base.weight.shape[1]
    encoder, _ = _encoder(params.num_virtual_tokens, width, params.encoder_hidden_size or width)
    embedding = EncodedEmbedding(base, params.num_virtual_tokens, encoder)
    lm.set_input_embeddings(embedding)
    keep_starts(lm, {name: param for name, param in lm.named_parameters() if _owns(name)}, dtype)
    return lm


def _owns(name: str) -> bool:
    return ".virtual." in name


def _save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save what the network makes of its embeddings."""
    import torch

    state = {name.partition(".virtual.")[2]: tensor for name, tensor in tensors.items()}
    count, width = state["embedding.weight"].shape
    encoder, config = _encoder(count, width, state["mlp_head.0.weight"].shape[0])
    encoder.to(state["embedding.weight"].dtype).load_state_dict(state)
    with torch.no_grad():
        prompts.save_prompt(lm, folder, config, encoder(torch.arange(count)))


SPEC = MethodSpec(
    name="p_tuning",
    title="P-tuning",
    params=PTuningParams,
    attach=_attach,
    owns=_owns,
    fresh=start_of,
    base_name=prompts.base_name,
    adapter=True,
    virtual_tokens=prompts.virtual_tokens,
    save_adapter=_save,
    library="peft",
)
