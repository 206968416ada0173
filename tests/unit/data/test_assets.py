"""Real rows and tokenizers, where DISTFT_ASSETS names a folder that has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import table_of

from distft.data.loader import Steps
from distft.data.prepare import prepare
from distft.data.render import load_renderer
from distft.data.store import Prepared

ASSETS = Path(os.environ.get("DISTFT_ASSETS", "/nowhere"))
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="DISTFT_ASSETS names no folder")
QWEN, GPT2, STORIES = ASSETS / "tokenizers/qwen2.5", ASSETS / "tokenizers/gpt2", ASSETS / "stories260k-hf"
GSM8K = {"path": str(ASSETS / "gsm8k/train.jsonl"), "columns": {"question": "prompt", "answer": "completion"}}


def made(tokenizer: Path, cache: Path, source: Path | dict[str, Any], **settings: Any) -> Prepared:
    table = table_of(source, **settings)
    return prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=cache)


@pytest.mark.parametrize(("tokenizer", "template"), [(QWEN, "chatml"), (GPT2, "plain"), (STORIES, "plain")])
def test_tool_chats_are_the_same_in_both_forms(tokenizer: Path, template: str, tmp_path: Path) -> None:
    folder = ASSETS / "chat-glaive-toolcall"
    settings = {"max_length": 16384, "chat_template": template}
    sharegpt, messages = (
        made(tokenizer, tmp_path, folder / name, **settings)
        for name in ("glaive_toolcall_en_demo.json", "messages.jsonl")
    )
    assert (sharegpt.report.sources[0].format, messages.report.sources[0].format) == ("sharegpt", "messages")
    assert (sharegpt.num_rows, sharegpt.fingerprint) == (300, messages.fingerprint)


@pytest.mark.parametrize("tokenizer", [QWEN, GPT2, STORIES])
def test_gsm8k_as_the_tokenizer_itself_has_it(tokenizer: Path, tmp_path: Path) -> None:
    rows = made(tokenizer, tmp_path, GSM8K | {"max_rows": 200}, max_length=4096)
    assert rows.num_rows == 200
    own = load_renderer(tokenizer).tokenizer
    import json

    with open(GSM8K["path"], encoding="utf-8") as file:
        for row, line in zip(range(200), file, strict=False):
            given = json.loads(line)
            ids, trained = rows.row(row)
            assert ids.tolist() == own(given["question"] + given["answer"] + own.eos_token)["input_ids"]
            prompt = own(given["question"])["input_ids"]
            same = np.cumprod([a == b for a, b in zip(prompt, ids, strict=False)]).sum()
            assert int(np.argmax(trained)) == same


def test_a_chat_template_with_marks_agrees_with_transformers(tmp_path: Path) -> None:
    renderer = load_renderer(QWEN)
    from distft.data.chat import conversation

    turns = ["What is 2 + 2?", "4 🌞", "And 3 + 3?", "6"]
    chat = conversation([{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)])
    rendered = renderer.render(chat)
    theirs = renderer.tokenizer.apply_chat_template(chat.messages, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered.ids_T.tolist() == theirs["input_ids"]
    assert rendered.trained_T.tolist() == [bool(bit) for bit in theirs["assistant_masks"]]


def test_stories_pack_nearly_full(tmp_path: Path) -> None:
    path = ASSETS / "tinystories/train.jsonl"
    rows = made(GPT2, tmp_path, path, max_length=2048)
    assert rows.num_rows == 2116
    table = table_of(path, max_length=2048)
    steps = Steps(rows, table, seed=0, epochs=1.0, max_steps=None, global_batch_size=8, micro_batch_size=1)
    assert steps.fill > 0.99
