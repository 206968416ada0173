"""What must hold for tokens that [model] adds: rules as in `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from distft.recipe.origin import RecipeMistake
from distft.recipe.schema import Recipe, Registries

_TEXTS = ("add_tokens", "add_special_tokens")


def added_tokens_are_texts(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that each added token is named once, and is more than white space."""
    seen: set[str] = set()
    for key, texts in zip(_TEXTS, recipe.model.added, strict=True):
        for index, text in enumerate(texts):
            if not text.strip():
                yield RecipeMistake(
                    key=("model", key, index), message=f'"{text}" is no text for a token', fix='such as "<tool>"'
                )
            elif text in seen:
                yield RecipeMistake(
                    key=("model", key, index), message=f'"{text}" is named twice', fix="leave one of them out"
                )
            seen.add(text)


def rows_belong_to_added_tokens(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that settings of new rows stand beside tokens, and that nothing grows that a saved adapter would not."""
    table = recipe.model
    if not any(table.added):
        for key in ("new_rows", "pad_vocabulary"):
            if getattr(table, key) is not None:
                yield RecipeMistake(
                    key=("model", key), message="has no effect: no tokens are added", fix="remove it, or set add_tokens"
                )
    elif table.pad_vocabulary is not None and recipe.method.spec.adapter:
        yield RecipeMistake(
            key=("model", "pad_vocabulary"),
            message="has no effect under adapters: PEFT loads them with as many rows as the tokenizer has tokens",
            fix="remove it",
            also=(("method", "name"),),
        )


TOKEN_RULES = (added_tokens_are_texts, rows_belong_to_added_tokens)
