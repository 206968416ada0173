"""Answers -> advice: the rules applied, and each method planned until one fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.advise.draft import recipe_text
from distft.advise.rules import decide
from distft.advise.situation import Decided, Situation

if TYPE_CHECKING:
    from distft.advise.fit import Fit
    from distft.plan.setup import Machine

_SETTINGS = (
    *("method", "target_modules", "r", "alpha", "learning_rate", "epochs", "max_length", "global_batch_size"),
    "optimizer",
)
_FIRST = ("approach", "objective", "beta", "sft_weight", "center", "methods")
_OF_PROMPTS = ("method", "target_modules", "r", "alpha", "learning_rate", "optimizer")
"""What rules say of prompts with a grader; how long to train on them is not known well enough for a rule."""
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
    """The decisions, in the order they were made, and the recipe that follows from them."""

    situation: Situation
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
        """Return plain values for JSON."""
        return {
            "approach": self.approach,
            "decided": [
                {"what": decision.rule.decides, "value": decision.value, "rule": decision.rule.name,
                 "says": decision.rule.says, "why": decision.rule.why, "source": decision.rule.source}
                for decision in self.decided
            ],
            "fits": [vars(fit) for fit in self.fits],
            "recipe": self.recipe,
        }  # fmt: skip


def advise(situation: Situation, names: Names, *, folder: Path | None, machine: Machine | None) -> Advice:
    """Apply the rules.

    Args:
        situation: what the rules look at.
        names: for the recipe.
        folder: holds the model's config.json; None: it is not on this machine, nothing is planned.
        machine: the GPUs; None: not said, nothing is planned.

    Raises:
        RecipeError: transformers does not know the config.
    """
    start: dict[str, Any] = {}
    first = _first(situation, start)

    def settings(method: str) -> list[Decided]:
        return decide(situation, _SETTINGS, {**start, "candidate": method})

    def text(method: str) -> str:
        return _text([*first, *settings(method)], names)

    fits: list[Fit] = []
    method = start["methods"][0]
    if folder is not None and machine is not None:
        from distft.advise.fit import first_that_fits

        fits = first_that_fits(start["methods"], text, folder, machine)
        method = fits[-1].method
    return Advice(situation=situation, decided=(*first, *settings(method)), fits=tuple(fits), recipe=text(method))


def decisions(situation: Situation) -> tuple[Decided, ...]:
    """Return what the rules say where nothing is planned and no recipe is written, such as beside fields of a form.

    Without a method that was chosen it is what holds of every method.
    """
    so_far: dict[str, Any] = {}
    first = _first(situation, so_far)
    if situation.method is None:
        return tuple(first)
    names = _OF_PROMPTS if situation.rows_hold == "prompts" else _SETTINGS
    return (*first, *decide(situation, names, {**so_far, "candidate": situation.method}))


def _first(situation: Situation, so_far: dict[str, Any]) -> list[Decided]:
    """Decide what does not depend on the method, and the methods to try; `so_far` is filled in."""
    made = decide(situation, _FIRST, so_far)
    if situation.method is None:
        return made
    so_far["methods"] = (situation.method,)
    return [decision for decision in made if decision.rule.decides != "methods"]


def parameters_in_name(model: str) -> float | None:
    """Return the number of parameters in a name (`Llama-3.1-8B` -> 8e9); None when it holds none."""
    numbers = _IN_NAME.findall(Path(model).name)
    return float(numbers[-1]) * 1e9 if numbers else None


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
    """Print each decision with rule, reason and source."""
    for decision in advice.decided:
        if decision.rule.decides == "methods":
            continue
        say(f"{decision.rule.decides:<18} {_shown(decision.value)}  ({decision.rule.name})")
        say(f"{'':<18} {decision.rule.says} {decision.rule.why}")
        say(f"{'':<18} {decision.rule.source}")
    for fit in advice.fits:
        say(f"{'plan':<18} {fit}")
        for change in fit.changes[:5]:
            say(f"{'':<20} {change}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
