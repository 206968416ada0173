"""A critic of its own beside models of other kinds: what has one, and what is refused with the reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import batch, build, documents

from distft.assemble.checkpoints import saved_shapes
from distft.core.errors import RecipeError
from distft.model.adapters import METHODS
from distft.model.paths import ForwardPath
from distft.model.policy import ModelPolicy

SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = SMALL | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
IMAGES = {
    "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": SMALL | {"model_type": "mistral"},
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "qlora"])
def test_of_a_mixture_of_experts(tmp_path: Path, method: str) -> None:
    """Its experts are trained whole, also beside a policy whose experts are in 4 bits."""
    folder = folder_of(tmp_path, EXPERTS | {"tie_word_embeddings": True})
    module = build(folder, method, head="lm_critic").module
    with torch.no_grad():
        module.value_head.weight.normal_()
    logprobs, values = ModelPolicy(module).token_logprobs_and_values(batch(documents([17, 9]), trained_from=3))
    (logprobs.sum() + values.sum()).backward()
    experts = {name: param for name, param in module.critic.named_parameters() if "experts" in name}
    assert len(experts) == 4
    assert all(param.dtype == torch.float32 and param.grad.any() for param in experts.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_has_none(tiny_config: Path, method: str) -> None:
    recipe: Any = SimpleNamespace(method=SimpleNamespace(spec=METHODS[method]))
    beside, alone = (
        saved_shapes(build(tiny_config, method, head=head, fill=False), recipe) for head in ("lm_critic", "lm")
    )
    assert beside == alone


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        (EXPERTS | {"output_router_logits": True}, {}, "a loss of the router"),
        (IMAGES, {}, "reads what is not text"),
        (
            SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            {"computed_by": ForwardPath(head="own")},
            "a critic cannot read its hidden states",
        ),
    ],
    ids=["router", "images", "own head"],
)
def test_models_that_have_none(tmp_path: Path, config: dict[str, Any], more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        build(folder_of(tmp_path, config), head="lm_critic", fill=False, **more)
    assert caught.value.problems[0].fix
