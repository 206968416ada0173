"""A tiny byte-level tokenizer with the special tokens of the built-in templates, and short-hands for tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distft.recipe.schema import DataTable, TrainSourceTable

SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
SENTENCES = (
    "Once upon a time there was a small tokenizer that had to read every word of the story.",
    "The weather in Rome is sunny. What is 2 + 2? It is 4. system user assistant tool",
    '{"name": "weather", "arguments": {"city": "Rome"}} You may call one or more functions.',
)


def save_tokenizer(folder: Path, **config: Any) -> Path:
    """A tokenizer folder; `config` goes into tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def table_of(*sources: Path | dict[str, Any], **settings: Any) -> DataTable:
    """A [data] table; a path is a source with defaults."""
    tables = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    settings = {"loss_on": "assistant", "chat_template": "chatml", "num_workers": 0} | settings
    return DataTable(train=tuple(TrainSourceTable(**table) for table in tables), **settings)


def texts(lengths: Iterable[int]) -> list[dict[str, str]]:
    """Rows of format `text` that have exactly these numbers of tokens: 0x01 has no merges, and </s> is added."""
    return [{"text": "\x01" * (length - 1)} for length in lengths]
