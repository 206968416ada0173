"""Tokens that a recipe adds to a model's tokenizer: the longer tokenizer, and what each token's text was before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from distft.core.errors import Problem, RecipeError
from distft.core.tokenizer_files import MORE_TEMPLATES, TOKENIZER_FILES, load_tokenizer, tokenizer_folder


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """One token, and what it replaces."""

    text: str
    id: int
    pieces: tuple[int, ...]
    """Ids that its text was split into before; empty where the tokenizer had none for it."""


def add_tokens(tokenizer: Any, plain: Sequence[str], special: Sequence[str]) -> tuple[AddedToken, ...]:
    """Add tokens to a fast transformers tokenizer, the plain ones first; their ids follow its last one.

    Args:
        tokenizer: is changed.
        plain: texts of tokens that stay visible when answers are decoded, and are read in messages.
        special: texts of control tokens: left out of decoded answers, and in chats written by the template alone.

    Raises:
        RecipeError: a token is there already.
    """
    from tokenizers import AddedToken as Entry

    known = tokenizer.get_vocab()
    for key, texts in (("add_tokens", plain), ("add_special_tokens", special)):
        there = [text for text in texts if text in known]
        if there:
            problem = Problem(
                message=f'[model] {key}: the tokenizer has "{there[0]}" already, as token {known[there[0]]}',
                fix="leave it out; LoRA trains the rows of existing tokens by [method] trainable_tokens",
            )
            raise RecipeError("recipe", [problem])
    unknown = tokenizer.unk_token_id
    pieces: dict[str, tuple[int, ...]] = {}
    for text in (*plain, *special):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces[text] = tuple(token for token in ids if token != unknown)
    for texts, is_special in ((plain, False), (special, True)):
        entries: list[Any] = [Entry(text, special=is_special, normalized=False) for text in texts]
        tokenizer.add_tokens(entries, special_tokens=is_special)
    found = tokenizer.convert_tokens_to_ids([*plain, *special])
    return tuple(
        AddedToken(text=text, id=token, pieces=pieces[text])
        for text, token in zip((*plain, *special), found, strict=True)
    )


def longer_tokenizer(
    path: str, revision: str | None, plain: Sequence[str], special: Sequence[str], cache: Path
) -> Path:
    """Return the folder of a tokenizer with added tokens, made in `cache` where it is not there yet.

    Raises:
        RecipeError: a token is there already.
        DataError: there is no tokenizer, or it cannot be loaded.
    """
    folder = tokenizer_folder(path, revision)
    files = [folder / name for name in (*TOKENIZER_FILES, "config.json") if (folder / name).is_file()]
    files += sorted(folder.glob(MORE_TEMPLATES))
    digest = hashlib.sha256(json.dumps([list(plain), list(special), version("transformers")]).encode())
    for file in files:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    target = cache / "tokenizers" / digest.hexdigest()[:24]
    if target.is_dir():
        return target
    tokenizer = load_tokenizer(path, revision)
    add_tokens(tokenizer, plain, special)
    aside = target.with_name(f".tmp-{uuid4().hex}")
    aside.mkdir(parents=True)
    tokenizer.save_pretrained(aside)
    if (folder / "config.json").is_file():  # its model_type decides the tokenizer's class
        shutil.copyfile(folder / "config.json", aside / "config.json")
    try:
        os.rename(aside, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(aside)  # another process was first, and has made the same
    return target
