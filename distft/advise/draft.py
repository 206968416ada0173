"""Decisions as a recipe: TOML whose comments name the rule behind each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from distft.advise.situation import Decided
from distft.model.adapters import METHODS
from distft.recipe.toml_text import toml_value

_ROOM = 44


def recipe_text(
    decided: Sequence[Decided],
    *,
    name: str,
    model: str,
    train: str,
    train_format: str,
    held_out: str | None,
    head: Sequence[str],
) -> str:
    """Return the recipe's text; `head`: lines of its first comment."""
    of = {decision.rule.decides: decision for decision in decided}
    return "\n".join(_lines(of, name, model, train, train_format, held_out, head)) + "\n"


def _lines(
    of: Mapping[str, Decided], name: str, model: str, train: str, form: str, held_out: str | None, head: Sequence[str]
) -> Iterator[str]:
    yield from (f"# {line}".rstrip() for line in head)
    yield from (f"name = {toml_value(name)}", "", "[model]", f"path = {toml_value(model)}", "", "[method]")
    yield _line("name", of["method"])
    for key in ("r", "alpha", "target_modules"):
        if key in of:
            yield _line(key, of[key])
    if METHODS[of["method"].value].quantized:
        yield 'quant = { type = "nf4", double = true }'
    if of["objective"].value != "sft":
        yield from ("", "[objective]", _line("name", of["objective"]))
        yield from (_line(key, of[key]) for key in ("beta", "sft_weight", "center") if key in of)
    yield from ("", "[data]", _line("max_length", of["max_length"]))
    yield from ("", "[[data.train]]", f"path = {toml_value(train)}", f"format = {toml_value(form)}", "")
    if held_out is not None:
        yield from ("[[data.eval]]", f"path = {toml_value(held_out)}", f"format = {toml_value(form)}", "")
    yield from ("[optim]", _line("name", of["optimizer"]), _line("learning_rate", of["learning_rate"]))
    yield from ("", "[schedule]", 'name = "cosine"', "warmup_ratio = 0.03")
    yield from ("", "[train]", _line("epochs", of["epochs"]), _line("global_batch_size", of["global_batch_size"]))


def _line(key: str, decision: Decided) -> str:
    return f"{f'{key} = {toml_value(decision.value)}':<{_ROOM}}# {decision.rule.name}"
