"""A tokenizer for decoding alone, and one that is saved beside a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distft.core.tokenizer_files import load_tokenizer, tokenizer_folder
from distft.data.templates import read_template


def load_decoder(path: str, revision: str | None = None) -> Callable[[list[int]], str]:
    """Return a decoder of ids, special tokens shown; without transformers where the tokenizer has its fast form.

    Raises:
        DataError: as `load_tokenizer`.
    """
    file = tokenizer_folder(path, revision) / "tokenizer.json"
    if not file.is_file():
        return load_tokenizer(path, revision).decode
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def save_tokenizer(path: str, folder: Path, *, chat_template: str = "auto", revision: str | None = None) -> None:
    """Write the tokenizer into `folder`, with the chat template that the model was trained on."""
    tokenizer = load_tokenizer(path, revision)
    if (text := read_template(chat_template)) is not None:
        tokenizer.chat_template = text
    tokenizer.save_pretrained(folder)
