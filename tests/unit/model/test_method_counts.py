"""How many parameters each method trains: the sums by hand, of models as large as they are used, by the plan."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from distft.model.adapters import METHODS
from distft.plan import inventory
from distft.recipe import ModelTable

D, LAYERS, HIDDEN, KV, VOCABULARY = 4096, 32, 14336, 1024, 128256
"""Llama-3.1-8B."""
Q, K, GATE, DOWN = D * D, D * KV, D * HIDDEN, HIDDEN * D
LINEAR = [(D, D), (D, KV), (D, KV), (D, D), (D, HIDDEN), (D, HIDDEN), (HIDDEN, D)]
"""(inputs, outputs) of a block's layers."""
SUMS: list[tuple[str, dict[str, Any], int]] = [
    ("lora", {"r": 16}, LAYERS * sum(16 * (inputs + outputs) for inputs, outputs in LINEAR)),
    ("prefix_tuning", {"num_virtual_tokens": 20}, 20 * 2 * KV * LAYERS),
    (
        "prefix_tuning",
        {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 512},
        20 * KV + (KV + 1) * 512 + (512 + 1) * 2 * KV * LAYERS,
    ),
    ("prompt_tuning", {"num_virtual_tokens": 20}, 20 * D),
    ("p_tuning", {"num_virtual_tokens": 20, "encoder_hidden_size": 128}, 20 * D + (D + 1 + 129 + D) * 128 + D),
    ("bottleneck", {"size": 64, "bias": False}, 2 * 2 * 64 * D * LAYERS),
    ("bottleneck", {"size": 64}, 2 * (2 * 64 * D + 64 + D) * LAYERS),
    ("bottleneck", {"size": 64, "placement": "pfeiffer"}, (2 * 64 * D + 64 + D) * LAYERS),
    ("ia3", {}, (KV + KV + HIDDEN) * LAYERS),
    ("vera", {"r": 256}, LAYERS * sum(256 + outputs for _, outputs in LINEAR)),
    ("oft", {"oft_block_size": 32}, LAYERS * sum(inputs // 32 * (32 * 31 // 2) for inputs, _ in LINEAR)),
    ("adalora", {"init_r": 12}, LAYERS * sum(12 * (inputs + outputs + 1) for inputs, outputs in LINEAR)),
    ("loha", {"r": 8}, LAYERS * sum(2 * 8 * (inputs + outputs) for inputs, outputs in LINEAR)),
    ("freeze", {"last_blocks": 2}, 2 * (sum(inputs * outputs for inputs, outputs in LINEAR) + 2 * D)),
    ("freeze", {"norms": True}, (2 * LAYERS + 1) * D),
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("llama"), kv_heads=8)


def written(folder: Path, *, kv_heads: int) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def counted(folder: Path, method: str, params: dict[str, Any]) -> inventory.Inventory:
    spec = METHODS[method]
    table = ModelTable(path=str(folder), init="random")
    return inventory.read(table, folder, spec, spec.params.model_validate(params))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "params", "trained"), SUMS, ids=lambda value: str(value))
def test_the_sum_by_hand(llama: Path, method: str, params: dict[str, Any], trained: int) -> None:
    found = counted(llama, method, params)
    assert found.trained == trained
    if METHODS[method].adapter:
        assert found.total == 8_030_261_248 + trained, "nothing of the base is left out or there twice"
    else:
        assert found.total == 8_030_261_248


def test_figures_that_people_quote(llama: Path, tmp_path: Path) -> None:
    assert counted(llama, "lora", {"r": 16}).trained == 41_943_040
    assert counted(llama, "bottleneck", {"size": 64, "bias": False}).trained == 33_554_432
    assert counted(llama, "ia3", {}).trained == 524_288
    assert counted(llama, "prompt_tuning", {"num_virtual_tokens": 20}).trained == 20 * 4096
    assert counted(llama, "vera", {"r": 256}).own_buffers == 2 * 256 * (HIDDEN + HIDDEN), (
        "in bf16, shared by all layers"
    )
    assert counted(llama, "prompt_tuning", {"num_virtual_tokens": 20}).own_buffers == 0
    without_groups = written(tmp_path, kv_heads=32)
    assert counted(without_groups, "prefix_tuning", {"num_virtual_tokens": 20}).trained == 20 * 2 * 4096 * 32
