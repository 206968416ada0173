"""What methods that train virtual tokens have in common: their settings, and PEFT's form of what they have trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class PromptParams(Params):
    """PEFT's name."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Positions before every document and every prompt that are trained; they count to [data] max_length."""
    start: str | None = None
    """Go on from an adapter that was trained before, instead of from none: its folder, the folder of a run, or a hub
    id. Base, layers and sizes have to be the same."""


def virtual_tokens(params: PromptParams) -> int:
    """Return the positions before every document."""
    return params.num_virtual_tokens


def base_name(name: str) -> str:
    """Return a name as the base's files have it, without the embedding that reads virtual ids."""
    return name.replace(".base.", ".", 1)


def stored_prompt(weights: Any, name: str, meta: Tensor) -> Tensor | None:
    """Return the saved prompt; see `MethodSpec.stored`."""
    return weights.get_tensor("prompt_embeddings") if "prompt_embeddings" in weights.keys() else None  # noqa: SIM118


def refuse_scores(lm: Any) -> None:
    """Refuse a model with a scalar head: PEFT gives it no virtual tokens that a plain loader reads back.

    Raises:
        RecipeError: it has one.
    """
    from distft.model.heads.spec import head_of

    head = head_of(lm)
    if head is not None and not head.generates:
        problem = Problem(message="[method] virtual tokens are trained under a language model's head", fix="use lora")
        raise RecipeError("recipe", [problem])


def save_prompt(lm: Any, folder: Path, config: Any, prompt: Tensor) -> None:
    """Write `prompt_embeddings` and its config, which PEFT loads for inference.

    Args:
        lm: the transformers model.
        folder: to write into.
        config: PEFT's, without what follows from the model.
        prompt: [virtual tokens, columns].
    """
    from safetensors.torch import save_file

    text = lm.config.get_text_config(decoder=True)
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = lm.name_or_path
    config.num_transformer_submodules, config.inference_mode = 1, True
    config.num_attention_heads = config.num_attention_heads or text.num_attention_heads
    config.num_layers = text.num_hidden_layers
    config.token_dim = config.token_dim or prompt.shape[1]
    config.save_pretrained(str(folder))
    save_file({"prompt_embeddings": prompt.contiguous()}, folder / "adapter_model.safetensors")
