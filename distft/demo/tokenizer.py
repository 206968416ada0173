"""A byte-level BPE tokenizer of at most 1,024 tokens, trained on the demo's rows."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
PAD, EOS = "<pad>", "</s>"
PAD_ID, EOS_ID = 0, 1

_PIECES = Regex(r"\n|\d| ?\p{L}+|[^\s\p{L}\d]+ ?|\s")
"""Newlines and digits stand alone: a prompt ends at a token, and numbers are read digit by digit. A space goes with
the mark before it, so that a word is the same token after `severity: ` and after `"severity":"`: adapters that learn
the second answer format leave embeddings alone."""

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS,
    "pad_token": PAD,
    "model_max_length": 1024,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}
"""tokenizer_config.json. No beginning-of-sequence token: prompts are raw text."""


def train(texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer of these texts; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
