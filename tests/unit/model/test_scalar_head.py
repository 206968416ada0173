"""Rewards of packed documents are those of transformers' own models with a scalar head, or the model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from distft.core.errors import RecipeError
from distft.model import attention, load
from distft.model.adapters import METHODS
from distft.model.causal import CausalLM
from distft.model.heads import HEADS
from distft.model.paths import SINGLE, ForwardPath
from distft.model.proof import difference_of
from distft.recipe.schema import ModelTable

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "pad_token_id": None,
}  # fmt: skip
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "gpt_neox", "qwen3_moe", "glm")


def difference(kind: str, path: ForwardPath) -> str:
    attention.register()
    config = AutoConfig.for_model(kind, **SMALL)
    hold = HEADS["scalar"].hold
    assert hold is not None
    return difference_of(lambda: hold(config, path, CPU, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_and_gradients_of_packed_documents_are_transformers_own(kind: str) -> None:
    assert difference(kind, ForwardPath()) == ""


def test_one_document_at_a_time_is_equal_too() -> None:
    path = ForwardPath(documents="single", attention=SINGLE)
    assert difference("llama", path) == ""


def test_a_reward_read_at_another_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CausalLM.scores
    monkeypatch.setattr(CausalLM, "scores", lambda self, ends_D, **given: right(self, ends_D=ends_D - 1, **given))
    assert "a reward differs by" in difference("llama", ForwardPath())


def folder_of(folder: Path, kind: str, **more: object) -> Path:
    folder.mkdir()
    content = AutoConfig.for_model(kind, **SMALL).to_dict() | more
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


def test_a_folder_with_another_head_is_refused(tmp_path: Path) -> None:
    labels = {"id2label": {"0": "bad", "1": "good"}, "architectures": ["LlamaForSequenceClassification"]}
    folder = folder_of(tmp_path / "model", "llama", **labels)
    table = ModelTable(path=str(folder), init="random", dtype="float32")
    method = METHODS["full"]
    with pytest.raises(RecipeError, match="has 2 labels, and a reward is one number"):
        load.build(table, folder, method, method.params(), seed=0, device=CPU, head=HEADS["scalar"])
    built = load.build(table, folder, method, method.params(), seed=0, device=CPU)
    assert type(built.module.transformer).__name__ == "LlamaForCausalLM", "another objective trains its language model"
