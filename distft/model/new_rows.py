"""Rows of embedding and head for tokens that a recipe adds: how many, what they start as, and that they are trained.

V rows of the vocabulary, E columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distft.core.added_tokens import AddedToken, add_tokens
from distft.core.errors import Problem, RecipeError
from distft.core.tokenizer_files import load_tokenizer
from distft.model.adapters import token_rows

if TYPE_CHECKING:
    from distft.recipe.schema import ModelTable

PAD_VOCABULARY = 64
"""Rows of a matrix product's tile on GPUs; what [model] pad_vocabulary is unless set."""
_OTHER_SIZES = ("vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size")
"""Further tables by token that some architectures have."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """What a recipe says of rows by token, with the ids of its tokenizer."""

    tokens: tuple[AddedToken, ...]
    trained: tuple[int, ...]
    """Ids whose rows are trained under adapters, ascending: those of added tokens and `trainable_tokens`."""
    how: str
    """"pieces" or "mean", see `ModelTable.new_rows`."""
    multiple: int
    """The embedding grows to a multiple of it."""
    tokenizer_length: int


def of_recipe(table: ModelTable, params: Any, *, adapter: bool) -> NewRows | None:
    """Return what the recipe says of rows by token; None where it says nothing.

    Args:
        table: [model].
        params: of the method.
        adapter: whether the method trains an adapter.

    Raises:
        RecipeError: a token that is added is there already, or one that is to be trained is not.
        DataError: there is no tokenizer.
    """
    named: tuple[str, ...] = getattr(params, "trainable_tokens", ())
    if not any(table.added) and not named:
        return None
    revision = table.revision if table.tokenizer is None else None
    tokenizer = load_tokenizer(table.tokenizer or table.path, revision)
    known = tokenizer.get_vocab()
    missing = [text for text in named if text not in known]
    if missing:
        pieces = tokenizer.tokenize(missing[0])
        problem = Problem(
            message=f'[method] trainable_tokens: "{missing[0]}" is no token of the tokenizer: it reads {pieces}',
            fix="name tokens as they stand in its vocabulary, or add it: [model] add_tokens",
        )
        raise RecipeError("recipe", [problem])
    tokens = add_tokens(tokenizer, *table.added)
    ids = {*(token.id for token in tokens), *(known[text] for text in named)}
    return NewRows(
        tokens=tokens,
        trained=tuple(sorted(ids)),
        how=table.new_rows or "pieces",
        multiple=1 if adapter else table.pad_vocabulary or PAD_VOCABULARY,
        tokenizer_length=len(tokenizer),
    )


def grow(config: Any, rows: NewRows) -> int:
    """Let the config's vocabulary have room for every token; return the rows that it had.

    Raises:
        RecipeError: the architecture has further tables by token, or the ids leave gaps.
    """
    text = config.get_text_config(decoder=True)
    before = int(text.vocab_size)
    needed = max((token.id for token in rows.tokens), default=0) + 1
    if needed <= before:
        return before
    others = [name for name in _OTHER_SIZES if isinstance(getattr(text, name, None), int)]
    if others:
        raise _mistake(f"{type(config).__name__} has another table by token ({others[0]}), which does not grow here")
    if needed != rows.tokenizer_length:
        raise _mistake(f"the last token has the id {needed - 1}, and the tokenizer {rows.tokenizer_length} tokens")
    text.vocab_size = -(-needed // rows.multiple) * rows.multiple
    return before


class RowStarts:
    """Gives rows of added tokens, and those that only fill up a multiple, what they start as."""

    def __init__(self, lm: Any, rows: NewRows, before: int, *, generates: bool) -> None:
        """Look at the model before anything is attached.

        Args:
            lm: transformers' model of the config that has grown.
            rows: of the recipe.
            before: rows that the embedding had.
            generates: whether its head has a row for each token.

        Raises:
            RecipeError: the model did not grow with its config.
        """
        self._rows, self._before = rows, before
        tables = [lm.get_input_embeddings(), lm.get_output_embeddings() if generates else None]
        self.tables = [table for table in tables if table is not None]
        wanted = lm.config.get_text_config(decoder=True).vocab_size
        if any(table.weight.shape[0] != wanted for table in self.tables):
            sizes = [table.weight.shape[0] for table in self.tables]
            raise _mistake(f"{type(lm).__name__} has {sizes} rows by token, and its config {wanted}")
        self._names = {name for name, module in lm.named_modules() if any(module is table for table in self.tables)}

    @property
    def has_tokens(self) -> bool:
        """Whether there are added tokens."""
        return bool(self._rows.tokens)

    def of(self, module: str, value: Tensor) -> Tensor:
        """Return what a tensor of a module starts as: the base's rows and the new ones, where it has rows by token.

        Args:
            module: its name in the base.
            value: [V before] or [V before, E].
        """
        if module not in self._names or not self._rows.tokens:
            return value
        old, wanted = value[: self._before], self.tables[0].weight.shape[0]
        mean = old.float().mean(0)
        grown = value.new_empty(wanted, *value.shape[1:])
        grown[: self._before] = old
        grown[self._before :] = mean.to(value.dtype)
        for token in self._rows.tokens:
            pieces = list(token.pieces) if self._rows.how == "pieces" else []
            grown[token.id] = (old[pieces].float().mean(0) if pieces else mean).to(value.dtype)
        return grown


def refuse_untrained(lm: Any, starts: RowStarts | None, *, generates: bool) -> None:
    """Refuse a method under which rows of added tokens would stay as they start.

    Args:
        lm: transformers' model, with what the method has attached.
        starts: of the recipe's added tokens; None without any.
        generates: whether its head has a row for each token.

    Raises:
        RecipeError: the embedding or the head is frozen.
    """
    if starts is None or not starts.has_tokens:
        return
    for table in (lm.get_input_embeddings(), lm.get_output_embeddings() if generates else None):
        if table is not None and not token_rows.trains(table) and not _is_trained(table):
            problem = Problem(
                message="[model] add_tokens: under this method the rows of new tokens would not be trained",
                fix='name = "lora", "qlora" or "full"; under "freeze" name the embedding and the head in parameters',
            )
            raise RecipeError("recipe", [problem])


def _is_trained(table: nn.Module) -> bool:
    return any(param.requires_grad for name, param in table.named_parameters() if name.endswith("weight"))


def _mistake(message: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[model] add_tokens: {message}", fix="use another model")])
