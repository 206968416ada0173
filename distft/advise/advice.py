"""Answers -> advice: the rules applied, and each method planned until one fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.advise.draft import recipe_text
from distft.advise.rules import Decided, Situation, decide

if TYPE_CHECKING:
    from distft.advise.fit import Fit
    from distft.plan.setup import Machine

_SETTINGS = (
    *("method", "target_modules", "r", "alpha", "learning_rate", "epochs", "max_length", "global_batch_size"),
    "optimizer",
)
_IN_NAME = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])", re.IGNORECASE)
GUIDE = "docs/choosing.md"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a recipe calls things."""

    name: str
    model: str
    train: str
    train_format: str
    held_out: str | None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do, in the order it was decided."""

    asked: Situation
    decided: tuple[Decided, ...]
    fits: tuple[Fit, ...]
    """Methods that were planned; empty when nothing was known to plan with."""
    recipe: str
    """TOML of a fine-tuning run, also where the first advice is another."""

    @property
    def approach(self) -> str:
        """The first advice: prompt, retrieve or fine-tune."""
        return self.decided[0].value

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "approach": self.approach,
            "decided": [
                {"what": one.rule.decides, "value": one.value, "rule": one.rule.name, "says": one.rule.says,
                 "why": one.rule.why, "source": one.rule.source}
                for one in self.decided
            ],
            "fits": [vars(fit) for fit in self.fits],
            "recipe": self.recipe,
        }  # fmt: skip


def advise(asked: Situation, names: Names, *, folder: Path | None, machine: Machine | None) -> Advice:
    """Apply the rules.

    Args:
        asked: what the rules look at.
        names: for the recipe.
        folder: holds the model's config.json; None: it is not on this machine, nothing is planned.
        machine: the GPUs; None: not said, nothing is planned.

    Raises:
        RecipeError: transformers does not know the config.
    """
    start: dict[str, Any] = {}
    first = decide(asked, ("approach", "methods"), start)

    def settings(method: str) -> list[Decided]:
        return decide(asked, _SETTINGS, {**start, "candidate": method})

    def text(method: str) -> str:
        return _text([*first, *settings(method)], names)

    fits: list[Fit] = []
    method = start["methods"][0]
    if folder is not None and machine is not None:
        from distft.advise.fit import first_that_fits

        fits = first_that_fits(start["methods"], text, folder, machine)
        method = fits[-1].method
    return Advice(asked=asked, decided=(*first, *settings(method)), fits=tuple(fits), recipe=text(method))


def parameters_in_name(model: str) -> float | None:
    """`Llama-3.1-8B` -> 8e9; None when a name does not say."""
    found = _IN_NAME.findall(Path(model).name)
    return float(found[-1]) * 1e9 if found else None


def _text(decided: list[Decided], names: Names) -> str:
    approach = decided[0]
    head = [f"Written by distft advise; the rule behind each line is in {GUIDE}."]
    if approach.value != "fine-tune":
        head.append(f"Its first advice was another: {approach.value} ({approach.rule.name}).")
    if names.held_out is None:
        head.append("Add [[data.eval]] with rows that are not trained on: without it nobody can say what it changed.")
    return recipe_text(decided, head=head, **vars(names))


Say = Callable[[str], None]


def tell(advice: Advice, say: Say) -> None:
    """In words: each decision with rule, reason and source."""
    for one in advice.decided:
        if one.rule.decides == "methods":
            continue
        say(f"{one.rule.decides:<18} {_shown(one.value)}  ({one.rule.name})")
        say(f"{'':<18} {one.rule.says} {one.rule.why}")
        say(f"{'':<18} {one.rule.source}")
    for fit in advice.fits:
        say(f"{'plan':<18} {fit}")
        for change in fit.changes[:5]:
            say(f"{'':<20} {change}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
