"""The recipe of a router: adapters of one base, rows that belong to each, and how the classifier is trained."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from distft.core.errors import Problem, RecipeError
from distft.core.nearest import nearest
from distft.core.registry import Params
from distft.recipe.lines import find_lines


class RouterTable(Params):
    """How a request is looked at, and the classifier trained."""

    classifier: Literal["trained", "arrow"] = "trained"
    """Trained on the rows; or Arrow, not trained: the adapter whose own directions a request has most of."""
    per: Literal["request", "token"] = "request"
    """One choice for a whole answer, or a new one before each of its tokens, from all that is there by then."""
    layer: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Depth of the base whose hidden state is looked at, as a share of its layers: 0 the embedding, 1 the last; auto:
    the one of five that chooses best on a fifth of the training rows, the deepest of equals."""
    pooling: Literal["mean", "last"] = "mean"
    """The mean over the tokens of the request, or its last token."""
    hidden_size: int = Field(default=0, ge=0)
    """Units between hidden state and choice; 0: none, the choice is linear."""
    choose: Literal["one", "mixture"] = "one"
    """The likeliest adapter, or the sum of the likeliest ones by their probabilities."""
    top_k: int = Field(default=2, ge=2)
    """Adapters of a mixture."""
    min_confidence: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Below this probability of the likeliest adapter the base answers alone."""
    num_steps: int = Field(default=300, ge=1)
    """Updates on all rows at once."""
    learning_rate: float = Field(default=0.02, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    held_out_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Of an adapter's rows, where it has no eval_rows."""


_OF_ARROW = frozenset({"classifier", "held_out_share"})
"""Keys of [router] that have an effect where nothing is trained."""


class RoutedAdapter(Params):
    """One adapter and the rows that are its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str = Field(min_length=1)
    """A run, or a folder in PEFT's form."""
    rows: str | None = None
    """Rows of requests that it should answer; the run's training rows where it is absent."""
    eval_rows: str | None = None
    """Held-out ones; the run's [[data.eval]], or a share of `rows`, where it is absent."""
    max_rows: int = Field(default=1000, ge=10)


class RouterRecipe(Params):
    """What `distft router train` reads."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    output_dir: str = "runs"
    seed: int = 0
    router: RouterTable = RouterTable()
    adapters: tuple[RoutedAdapter, ...] = Field(min_length=2, strict=False)

    @property
    def folder(self) -> Path:
        """Where the router is written."""
        return Path(self.output_dir) / self.name


def load_router_recipe(file: Path) -> RouterRecipe:
    """Read a recipe.

    Raises:
        RecipeError: it cannot be read, or every mistake in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        raw: dict[str, Any] = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(file), [Problem(message=f"cannot be read: {error}")]) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(file), [Problem(message=f"is no TOML: {error}")]) from None
    lines = find_lines(text)
    try:
        made = RouterRecipe(**raw)
    except ValidationError as error:
        raise RecipeError(str(file), [_problem(each, lines) for each in error.errors()]) from None
    names = [adapter.name for adapter in made.adapters]
    problems = [
        Problem(message=f'[[adapters]] name = "{name}" is there twice', line=lines.get(("adapters", place, "name")))
        for place, name in enumerate(names)
        if name in names[:place] or name in ("tuned", "base", "default", "router")
    ]
    if made.router.choose == "one" and "top_k" in made.router.model_fields_set:
        line = lines.get(("router", "top_k"))
        problems.append(
            Problem(message='[router] top_k: has no effect with choose = "one"', line=line, fix="remove it")
        )
    if made.router.classifier == "arrow":
        problems += [
            Problem(
                message=f'[router] {key}: has no effect with classifier = "arrow"',
                line=lines.get(("router", key)),
                fix="remove it: Arrow is not trained, and chooses one adapter for a request",
            )
            for key in sorted(made.router.model_fields_set - _OF_ARROW)
        ]
    if problems:
        raise RecipeError(str(file), problems)
    return made


def _problem(fault: Any, lines: dict[Any, int]) -> Problem:
    key = tuple(fault["loc"])
    shown = ".".join(str(part) for part in key)
    allowed: dict[str, type[Params]] = {"router": RouterTable, "adapters": RoutedAdapter}
    fix = ""
    if fault["type"] == "extra_forbidden":
        fields = list(allowed.get(str(key[0]), RouterRecipe).model_fields)
        meant = nearest(str(key[-1]), fields)
        fix = (f"did you mean {meant}?  " if meant else "") + f"allowed: {', '.join(fields)}"
    line = next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)
    return Problem(message=f"{shown}: {str(fault['msg']).lower()}", line=line, fix=fix)
