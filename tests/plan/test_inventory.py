"""A model repeated on paper is the model: same parameters in the same order as one built whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_kit import CRITIC, LLAMA_8B, SMALL, read, recipe_of, write

from distft.model import load, stats
from distft.model.heads import HEADS
from distft.plan import inventory


def whole(folder: Path, recipe: Any) -> Any:
    method = recipe.method
    cpu = torch.device("cpu")
    head = HEADS[recipe.objective.spec.head_of(recipe.objective.params)]
    return load.build(recipe.model, folder, method.spec, method.params, seed=0, device=cpu, weights=False, head=head)


@pytest.mark.parametrize("critic", [(), CRITIC], ids=["alone", "critic"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_repeated_blocks_are_the_blocks_of_the_whole_model(small: Path, method: str, critic: tuple[str, ...]) -> None:
    """A critic of its own is a second row of as many blocks, none of them in 4 bits, and all of it is trained."""
    recipe = recipe_of(small, f'method.name="{method}"', *critic)
    found = read(recipe)
    assert found.depths == (2, 3)
    model = whole(small, recipe)
    built = model.module
    of_block = {id(param): index for index, block in enumerate(model.blocks) for param in block.parameters()}
    assert [param.block for param in found.params] == [of_block.get(id(param), -1) for param in built.parameters()]
    of_critic = [param for param in found.params if not param.name.startswith("lm.")]
    assert all(param.trained and param.double is None for param in of_critic)
    assert len({param.block for param in of_critic}) == (6 if critic else 0), "of five blocks, and beside them"
    assert found.policy.total == found.total - sum(param.numel for param in of_critic)
    assert [param.name for param in found.params] == [name for name, _ in built.named_parameters()]
    assert [param.trained for param in found.params] == [param.requires_grad for param in built.parameters()]
    counts = stats.count(built)
    assert (found.total, found.trained) == (counts.total, counts.trainable)
    flops = sum((6.0 if trained else 4.0) * numel for numel, trained in found.linears + found.critic_linears)
    assert flops == stats.flops_per_token(built)


def test_counts_of_8b_and_of_its_adapters(llama8b: Path) -> None:
    assert read(recipe_of(llama8b)).total == 8_030_261_248
    assert read(recipe_of(llama8b, 'method.name="lora"')).trained == 41_943_040


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    tied = read(recipe_of(write(tmp_path / "tied", SMALL | {"tie_word_embeddings": True})))
    untied = read(recipe_of(write(tmp_path / "untied", SMALL)))
    assert untied.total - tied.total == SMALL["vocab_size"] * SMALL["hidden_size"]


def test_blocks_that_differ_are_all_built(tmp_path: Path) -> None:
    """A mixture of experts in every second block: no two of which stand for the rest."""
    mixed = SMALL | {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_hidden_layers": 4, "num_experts": 4,
        "decoder_sparse_step": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    }  # fmt: skip
    folder = write(tmp_path / "moe", mixed)
    recipe = recipe_of(folder)
    found = read(recipe)
    assert found.depths == (4,)
    assert found.total == stats.count(whole(folder, recipe).module).total


@pytest.mark.parametrize("critic", [(), CRITIC], ids=["alone", "critic"])
def test_another_depth_is_another_model(small: Path, tmp_path: Path, critic: tuple[str, ...]) -> None:
    deeper = read(recipe_of(write(tmp_path / "deeper", SMALL | {"num_hidden_layers": 9}), *critic))
    resized = inventory.resized(read(recipe_of(small, *critic)), 9)
    assert resized.params == deeper.params
    assert resized.linears == deeper.linears
    assert resized.critic_linears == deeper.critic_linears


def test_generation_config_and_weights_are_not_needed(llama8b: Path) -> None:
    assert [path.name for path in llama8b.iterdir()] == ["config.json"]
    assert json.loads((llama8b / "config.json").read_text()) == LLAMA_8B
