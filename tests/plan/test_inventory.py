"""A model repeated on paper is the model: same parameters in the same order as one built whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_kit import LLAMA_8B, SMALL, read, recipe_of, write

from distft.model import load, stats
from distft.plan import inventory


def whole(folder: Path, recipe: Any) -> Any:
    method = recipe.method
    cpu = torch.device("cpu")
    return load.build(recipe.model, folder, method.spec, method.params, seed=0, device=cpu, weights=False)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_repeated_blocks_are_the_blocks_of_the_whole_model(small: Path, method: str) -> None:
    recipe = recipe_of(small, f'method.name="{method}"')
    found = read(recipe)
    assert found.depths == (2, 3)
    built = whole(small, recipe).module
    assert [param.name for param in found.params] == [name for name, _ in built.named_parameters()]
    assert [param.trained for param in found.params] == [param.requires_grad for param in built.parameters()]
    counts = stats.count(built)
    assert (found.total, found.trained) == (counts.total, counts.trainable)
    flops = sum((6.0 if trained else 4.0) * numel for numel, trained in found.linears)
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


def test_another_depth_is_another_model(small: Path, tmp_path: Path) -> None:
    deeper = write(tmp_path / "deeper", SMALL | {"num_hidden_layers": 9})
    resized = inventory.resized(read(recipe_of(small)), 9)
    assert resized.params == read(recipe_of(deeper)).params
    assert resized.linears == read(recipe_of(deeper)).linears


def test_generation_config_and_weights_are_not_needed(llama8b: Path) -> None:
    assert [path.name for path in llama8b.iterdir()] == ["config.json"]
    assert json.loads((llama8b / "config.json").read_text()) == LLAMA_8B
