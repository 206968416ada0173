"""Weights go straight into shards: while a sharding engine loads, a rank never holds the whole model."""

import json
from pathlib import Path

import pytest
import torch
from harness import ROOT, run, torchrun
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


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_rank_never_holds_the_whole_model(model: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "facts"
    worker = [str(ROOT / "tests/dist/memory_worker.py"), engine, str(model), str(out)]
    done = run([*torchrun(2), *worker])
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        facts = json.loads(Path(f"{out}.{rank}").read_text())
        assert facts["peak"] <= facts["whole"] / 2 + facts["largest_unit"], facts
        assert facts["peak"] < 0.7 * facts["whole"], facts
        assert facts["after"] <= facts["whole"] / 2 + 4096, facts
