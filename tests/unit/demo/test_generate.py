"""Answers come from plain transformers, whatever kind of folder is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.demo.files import locate_path
from distft.demo.generate import _load, answers
from distft.demo.incidents import PROMPT_END


@pytest.fixture(scope="module")
def untrained(demo_cache: Path) -> str:
    return locate_path("demo:tiny-llama")


@pytest.fixture(scope="module")
def trained(untrained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder, as a run leaves it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("final")
    _load(Path(untrained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(untrained).save_pretrained(folder)
    return folder


PROMPTS = ["The edge proxy times out." + PROMPT_END, "Short." + PROMPT_END, "No data was lost. " * 9 + PROMPT_END]


def test_a_model_without_weights_answers_the_same_every_time(untrained: str) -> None:
    first = answers(untrained, PROMPTS, max_new_tokens=8)
    assert len(first) == len(PROMPTS)
    assert first == answers(untrained, PROMPTS, max_new_tokens=8)


def test_an_answer_does_not_depend_on_its_neighbours(trained: Path) -> None:
    together = answers(trained, PROMPTS, max_new_tokens=8)
    assert together == [answers(trained, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert together == answers(locate_path(str(trained)), PROMPTS, max_new_tokens=8)


def test_an_adapter_answers_through_its_base(trained: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoTokenizer

    adapted: Any = get_peft_model(_load(trained), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(adapted, PeftModel)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    adapted.save_pretrained(str(tmp_path))
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    assert answers(tmp_path, PROMPTS, max_new_tokens=8) != answers(trained, PROMPTS, max_new_tokens=8)


def test_transformers_loads_the_tokenizer(untrained: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(untrained)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "</s>", None)
    ids = tokenizer("Retrying does not help.")["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "Retrying does not help."
