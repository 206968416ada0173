"""Weights go straight into shards: while a sharding engine loads, a rank never holds the whole model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from forks import shared
from harness import ROOT, run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eight-blocks")
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded(engine: str, model: Path, out: Path, *, world: int, node: int) -> list[dict]:
    """What each rank notes while one engine takes a model over."""
    worker = [str(ROOT / "tests/dist/memory_worker.py"), engine, str(model), str(out), str(node)]
    run_ranks(world, worker)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_rank_never_holds_the_whole_model_and_reads_its_part(model: Path, tmp_path: Path, engine: str) -> None:
    ranks = loaded(engine, model, tmp_path / "facts", world=2, node=2)
    for facts in ranks:
        assert facts["peak"] <= facts["whole"] / 2 + facts["largest_unit"], facts
        assert facts["peak"] < 0.7 * facts["whole"], facts
        assert facts["after"] <= facts["whole"] / 2 + 4096, facts
    assert_read(ranks, times=1)


def assert_read(ranks: list[dict], *, times: int) -> None:
    """The files were read so many times by all together, and by each rank about as much."""
    whole = ranks[0]["whole"]
    assert sum(facts["read"] for facts in ranks) == times * whole
    share = times * whole / len(ranks)
    assert all(0.75 * share < facts["read"] < 1.25 * share for facts in ranks), ranks


def test_weights_are_read_once_a_node(model: Path, tmp_path: Path) -> None:
    """Two nodes of two ranks: groups of their own. Ranks that hold all weights hold no more while they read."""
    ranks = loaded("ddp", model, tmp_path / "facts", world=4, node=2)
    assert_read(ranks[:2], times=1)
    assert_read(ranks[2:], times=1)
    assert all(facts["peak"] == facts["whole"] for facts in ranks)


def test_a_rank_alone_on_its_node_reads_all(model: Path, tmp_path: Path) -> None:
    assert_read(loaded("zero1", model, tmp_path / "facts", world=2, node=1), times=2)


def test_a_damaged_weight_ends_every_rank_with_its_name(model: Path, tmp_path: Path) -> None:
    """One rank reads it; the others neither wait for it nor train."""
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.7.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    worker = [str(ROOT / "tests/dist/memory_worker.py"), "fsdp2", str(damaged), str(tmp_path / "facts"), "2"]
    assert 0 not in shared().script(2, worker, limit_s=120, env={})
    printed = shared().stderr()
    assert "RecipeError" in printed
    assert "PeerEnded" in printed
    assert printed.count("layers.7.mlp.down_proj.weight holds infinite values") >= 2, printed[-3000:]
