"""A tokenizer's files, found here or on the hub, and the transformers tokenizer that they make."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from distft.core import hub
from distft.core.errors import DataError

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Everything that decides how text becomes ids; weights are not among them."""
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
"""Chat templates with a name of their own, such as "tool_use"."""


def tokenizer_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder with the tokenizer's files; those of a hub id are fetched or found in the hub's cache.

    Raises:
        DataError: there is no such folder or hub id, or it holds no tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        wanted = [*TOKENIZER_FILES, MORE_TEMPLATES, "config.json"]
        try:
            folder = hub.snapshot(path, revision, wanted)
        except Exception as error:  # the hub library raises many kinds; all mean: no tokenizer
            raise DataError(
                f"tokenizer {path}: neither a folder here nor a model that the hub gives: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DataError(f"tokenizer {path}: the folder holds no tokenizer.json")
    return folder


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """Return the fast transformers tokenizer of a folder or hub id; it neither truncates nor pads.

    Raises:
        DataError: it cannot be loaded, runs remote code, has no fast form or no end-of-sequence token.
    """
    library: Any = importlib.import_module("transformers")
    folder = tokenizer_folder(str(path), revision)
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer file makes the library raise
        raise DataError(f"tokenizer {path}: cannot be loaded: {type(error).__name__}: {error}") from None
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {path}: has no fast form (tokenizer.json), which the loss mask needs")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {path}: has no end-of-sequence token, so a model trained with it would not stop  "
            'name it as "eos_token" in tokenizer_config.json'
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may carry both; cutting is this room's business
    backend.no_padding()
    return tokenizer
