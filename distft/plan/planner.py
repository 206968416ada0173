"""Plans a recipe file under many methods, engines and changes: reads it anew for each, so that its rules apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distft.catalog import REGISTRIES
from distft.core.errors import DistftError, MachineError, RecipeError
from distft.model.paths import ForwardPath
from distft.model.proving import path_of, verdict_on
from distft.plan import inventory as inventories
from distft.plan.case import PlanCase, plan
from distft.plan.inventory import Inventory
from distft.plan.max_size import Limit, largest
from distft.plan.setup import Machine
from distft.plan.suggestions import RecipeChange, changes
from distft.recipe import Recipe, load_recipe
from distft.recipe.toml_text import toml_value


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A method and engine that cannot be combined, and why."""

    method: str
    engine: str
    reason: str


@dataclass(kw_only=True)
class Planner:
    """One recipe file, one config, one machine."""

    path: str
    overrides: Sequence[str]
    folder: Path
    """Holds config.json."""
    machine: Machine
    path_of_model: ForwardPath | None = None
    """How the model's numbers are computed, where it is known; else it is proven, or read from the cache of proofs."""
    document_tokens: int | None = None
    """Tokens of a row on average, where it is known."""
    _read: dict[str, Inventory] = field(default_factory=dict)
    _proven: dict[str, ForwardPath] = field(default_factory=dict)

    def recipe(self, extra: Sequence[str] = ()) -> Recipe:
        """Load the recipe with the user's overrides, then `extra`.

        Raises:
            RecipeError: every mistake in it.
        """
        return load_recipe(self.path, registries=REGISTRIES, overrides=[*self.overrides, *extra])

    def case(self, extra: Sequence[str] = (), machine: Machine | None = None) -> PlanCase:
        """Plan the recipe with further overrides, on this machine or another.

        Raises:
            RecipeError: the recipe's rules refuse them.
            MachineError: the engine does.
        """
        recipe = self.recipe(extra)
        inventory = self.inventory(recipe)
        return plan(recipe, inventory, machine or self.machine, document_tokens=self.document_tokens)

    def inventory(self, recipe: Recipe) -> Inventory:
        """Return the model as the recipe trains it; read once for each method and type.

        Raises:
            RecipeError: transformers does not know the config, or no path gives the model's numbers.
        """
        path = self._path(recipe)
        head = recipe.objective.spec.head_of(recipe.objective.params)
        key = f"{recipe.method.name} {recipe.method.params!r} {recipe.model.dtype} {path} {head}"
        if key not in self._read:
            spec, params = recipe.method.spec, recipe.method.params
            self._read[key] = inventories.read(recipe.model, self.folder, spec, params, path=path, head=head)
        return self._read[key]

    def _path(self, recipe: Recipe) -> ForwardPath:
        """Return the path as a run proves it, on this machine: without an accelerator, on its CPU."""
        if self.path_of_model is not None:
            return self.path_of_model
        head = recipe.objective.spec.head_of(recipe.objective.params)
        key = f"{recipe.model.attention} {recipe.model.dtype} {recipe.data.max_length} {head}"
        if key not in self._proven:
            model, length = recipe.model, recipe.data.max_length
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            verdict = verdict_on(model, self.folder, max_length=length, device=device, head=head)
            line = recipe.line_of("model.path")
            self._proven[key] = path_of(verdict, source=recipe.source, line=line, attention=model.attention)
        return self._proven[key]

    def cases(self, methods: Sequence[str], engines: Sequence[str]) -> tuple[list[PlanCase], list[Refused]]:
        """Plan every method under every engine; the recipe's own where a list is empty.

        Raises:
            RecipeError: with one method and engine, what refuses them.
            MachineError: the same.
        """
        base_recipe = self.recipe()
        planned: list[PlanCase] = []
        refused: list[Refused] = []
        pairs = [(method, engine) for method in methods or [base_recipe.method.name] for engine in engines or [""]]
        for method, engine in pairs:
            extra = [
                *method_override(base_recipe, method),
                *engine_override(base_recipe, engine or base_recipe.engine.name),
            ]
            try:
                planned.append(self.case(extra))
            except (RecipeError, MachineError) as error:
                if len(pairs) == 1:
                    raise
                refused.append(
                    Refused(method=method, engine=engine or base_recipe.engine.name, reason=_one_line(error))
                )
        return planned, refused

    def changes(self, case: PlanCase) -> list[RecipeChange]:
        """Return changes that would make `case` fit."""
        recipe = case.setup.recipe
        base_recipe = self.recipe()
        base = [*method_override(base_recipe, recipe.method.name), *engine_override(base_recipe, case.setup.engine)]
        return changes(case, lambda extra, machine: self.case([*base, *extra], machine))

    def limit(self, what: str, case: PlanCase) -> Limit:
        """Find the largest sequence (`seq`), micro-batch (`micro`) or model (`model`) with which `case` fits.

        What the recipe leaves to `auto` stays as `case` has it, but for the micro-batch under `seq` and `model`: one.
        """
        base_recipe = self.recipe()
        base = [
            *method_override(base_recipe, case.setup.recipe.method.name),
            *engine_override(base_recipe, case.setup.engine),
        ]
        base.append(f'train.activation_checkpointing="{case.setup.checkpointing}"')
        world = self.machine.world
        match what:
            case "seq":
                return self._longest([*base, "train.micro_batch_size=1"])
            case "micro":

                def of(micro: int) -> PlanCase:
                    batch = f"train.global_batch_size={world * micro}"
                    return self.case([*base, f"train.micro_batch_size={micro}", batch])

                return largest(what, of, step=1)
            case _:
                recipe = self.recipe([*base, "train.micro_batch_size=1"])
                model = self.inventory(recipe)

                def deep(blocks: int) -> PlanCase:
                    deeper = inventories.resized(model, blocks)
                    return plan(recipe, deeper, self.machine, document_tokens=self.document_tokens)

                return largest(what, deep, step=model.depths[-1])

    def _longest(self, overrides: list[str]) -> Limit:
        """Find the longest sequence; the path is proven at that length too, for a few models change it with length."""

        def longest_under(path: ForwardPath) -> Limit:
            fixed = replace(self, path_of_model=path)
            return largest("seq", lambda tokens: fixed.case([*overrides, f"data.max_length={tokens}"]), step=256)

        path = self._path(self.recipe(overrides))
        limit = longest_under(path)
        if limit.case is None:
            return limit
        there = self._path(limit.case.setup.recipe)
        return limit if there == path else longest_under(there)


def method_override(recipe: Recipe, method: str) -> list[str]:
    """Return an override with the recipe's settings of its method, as far as another method has them too."""
    if method == recipe.method.name:
        return []
    fields = REGISTRIES.method[method].params.model_fields
    kept = {key: value for key, value in _set(recipe.method.params).items() if key in fields}
    return [f"method={toml_value({'name': method, **kept})}"]


def engine_override(recipe: Recipe, engine: str) -> list[str]:
    """Return an override with the recipe's settings of its engine, as far as another engine has them too."""
    if engine == recipe.engine.name:
        return []
    fields = REGISTRIES.engine[engine].params.model_fields
    kept = {key: value for key, value in _set(recipe.engine.params).items() if key in fields}
    return [f"engine={toml_value({'name': engine, **kept})}"]


def _set(params: Any) -> dict[str, Any]:
    return params.model_dump(mode="json", exclude_defaults=True, exclude_none=True)


def _one_line(error: DistftError) -> str:
    problems = getattr(error, "problems", ())
    return "; ".join(problem.message for problem in problems) if problems else str(error).splitlines()[0]
