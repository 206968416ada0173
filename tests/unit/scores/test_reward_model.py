"""The reward of an answer is that of the reward model on the whole document, read at its last token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_kit import save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from distft.core.errors import DataError, RecipeError
from distft.scores import SCORES, Answer
from distft.scores.reward_model import RewardModelParams

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def folder(path: Path, *, template: str = "", labels: int = 1, pad: int = 1) -> Path:
    """A tiny reward model whose padding token is its end of sequence, and whose head is not zero."""
    save_tokenizer(path)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_labels=labels, pad_token_id=pad, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


def score(path: Path, *answers: Answer) -> list[float]:
    spec = SCORES["reward_model"]
    result = spec.build(RewardModelParams(path=str(path), dtype="float32", device="cpu"))(answers)
    return list(result.rows["reward"])


def plain(path: Path, ids: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1].item()


def test_raw_text_ends_with_the_end_of_sequence_which_is_read(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path)
    ids = [*AutoTokenizer.from_pretrained(path)("the disk is full")["input_ids"], 1]
    [reward] = score(path, Answer(id="a", row={}, reference="", prompt="the disk ", text="is full"))
    assert reward == pytest.approx(plain(path, ids), abs=1e-6)
    assert reward != pytest.approx(plain(path, ids[:-1]), abs=1e-6), "where padding is the end of sequence too"


def test_a_chat_is_written_by_the_reward_models_own_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path, template=TEMPLATE)
    asked = ({"role": "user", "content": "is the disk full?"},)
    answer = Answer(id="a", row={}, reference="", prompt="[the policy's own words]", text="yes", messages=asked)
    text = "<|user|>is the disk full?<|end|><|assistant|>yes<|end|>"
    ids = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
    assert score(path, answer) == pytest.approx([plain(path, ids)], abs=1e-6)
    bare = folder(tmp_path / "bare")
    with pytest.raises(DataError, match="a: the question is a chat, and the reward model's tokenizer has no template"):
        score(bare, answer)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "neither config.json nor adapter_config.json"),
        ("language model", "LlamaForCausalLM has no scalar head"),
        ("two labels", "the model has 2 labels, and a reward is one number"),
        ("adapter", "the adapter's task_type is CAUSAL_LM, not SEQ_CLS"),
        ("torn", "its config is no JSON"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_anything_is_asked(tmp_path: Path, kind: str, message: str) -> None:
    if kind == "language model":
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)  # fmt: skip
    elif kind == "two labels":
        folder(tmp_path, labels=2)
    elif kind == "adapter":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM"}))
    elif kind == "torn":
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=message):
        SCORES["reward_model"].build(RewardModelParams(path=str(tmp_path)))
