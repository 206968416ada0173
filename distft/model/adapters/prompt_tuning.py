"""Prompt tuning: the embeddings of virtual tokens before every document are trained, and nothing else.

Source: https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from distft.core.errors import Problem, RecipeError
from distft.model.adapters import prompts
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

_INIT = "prompt_starts_as"


class PromptTuningParams(prompts.PromptParams):
    """PEFT's names."""

    init: Literal["random", "sample_vocab", "text"] = "sample_vocab"
    """What virtual tokens start as: normal noise, embeddings of tokens drawn from the vocabulary, or those of
    `init_text`."""
    init_text: str = ""
    """Its tokens, by the tokenizer in the model's folder, are what virtual tokens start as, repeated or cut to their
    number."""

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> Self:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError('init = "text" and init_text = "..." belong together')
        return self


def _attach(lm: Any, params: PromptTuningParams, dtype: torch.dtype) -> nn.Module:
    from distft.model.adapters.virtual_tokens import VirtualEmbedding

    prompts.refuse_scores(lm)
    lm.requires_grad_(False)
    embedding = VirtualEmbedding(lm.get_input_embeddings(), params.num_virtual_tokens, dtype)
    embedding.__dict__[_INIT] = _tokens_of(lm, params) if params.init == "text" else params.init
    lm.set_input_embeddings(embedding)
    return lm


def _tokens_of(lm: Any, params: PromptTuningParams) -> list[int]:
    """Return the ids of the text, as many as there are virtual tokens.

    Raises:
        RecipeError: the model's folder has no tokenizer, or the text no tokens.
    """
    from transformers import AutoTokenizer

    try:
        ids: Any = AutoTokenizer.from_pretrained(lm.name_or_path)(params.init_text, add_special_tokens=False)[
            "input_ids"
        ]
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        problem = Problem(message=f"[method] init_text: {lm.name_or_path} has no tokenizer ({first})",
                          fix='init = "sample_vocab"')  # fmt: skip
        raise RecipeError("recipe", [problem]) from error
    if not ids:
        raise RecipeError("recipe", [Problem(message="[method] init_text has no tokens", fix="write some words")])
    return (ids * -(-params.num_virtual_tokens // len(ids)))[: params.num_virtual_tokens]


def _owns(name: str) -> bool:
    return ".virtual." in name


def _fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the rows; tokens are embedded by the base's own forward, as in PEFT."""
    import torch

    embedding: Any = model.get_submodule(name.partition(".virtual.")[0])
    init = embedding.__dict__[_INIT]
    if init == "random":
        return torch.empty(meta.shape).normal_(generator=generator)
    base = embedding.base
    if init == "sample_vocab":
        ids = torch.randint(0, base.weight.shape[0], (meta.shape[0],), generator=generator)
    else:
        ids = torch.tensor(init)
    with torch.no_grad():
        return base(ids.to(base.weight.device)).float()


def _save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    from peft import PromptTuningConfig

    [prompt] = tensors.values()
    prompts.save_prompt(lm, folder, PromptTuningConfig(num_virtual_tokens=len(prompt)), prompt)


SPEC = MethodSpec(
    name="prompt_tuning",
    title="Prompt tuning",
    params=PromptTuningParams,
    attach=_attach,
    owns=_owns,
    fresh=_fresh,
    base_name=prompts.base_name,
    adapter=True,
    virtual_tokens=prompts.virtual_tokens,
    save_adapter=_save,
    stored=prompts.stored_prompt,
    library="peft",
)
