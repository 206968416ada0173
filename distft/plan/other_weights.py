"""Weights that stand on a rank beside the trained model: those of before training, and a teacher's."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distft.engine.footprint import gib_text
from distft.model import skeleton
from distft.model.adapters import METHODS
from distft.model.adapters.spec import optimizer_of
from distft.plan import inventory as inventories
from distft.plan import state as states
from distft.plan.inventory import Inventory
from distft.plan.setup import Setup
from distft.plan.trace import activations
from distft.recipe.schema import DEFAULT_PARTS, ModelTable

if TYPE_CHECKING:
    from distft.plan.memory import Part


@dataclass(frozen=True, kw_only=True)
class OtherWeights:
    """What a rank holds of them."""

    device: int = 0
    """Bytes on its device, for as long as the run lasts."""
    host: int = 0
    """Bytes in host memory, under `offload = "all"`."""
    forward: int = 0
    """Bytes on the device beside those in a teacher's forward: gathered layers and activations."""
    parts: tuple[tuple[str, int, str], ...] = ()
    """Name, bytes and formula of each."""

    def __add__(self, other: OtherWeights) -> OtherWeights:
        return OtherWeights(
            device=self.device + other.device,
            host=self.host + other.host,
            forward=max(self.forward, other.forward),
            parts=(*self.parts, *other.parts),
        )

    def listed(self, part: type[Part]) -> list[Part]:
        """Return the parts of a plan."""
        return [part(name=name, num_bytes=num_bytes, formula=formula) for name, num_bytes, formula in self.parts]


def of_setup(inventory: Inventory, setup: Setup) -> OtherWeights:
    """Return what a rank that holds most has of both."""
    return _reference(inventory, setup) + _teacher(setup)


def teacher_of(setup: Setup) -> Inventory | None:
    """Return the teacher that the objective names; None where it names none.

    Raises:
        RecipeError: it is neither a folder with a config.json nor a hub id that can be had.
    """
    objective = setup.recipe.objective
    path = objective.spec.teacher(objective.params)
    if path is None:
        return None
    table = setup.recipe.model.model_copy(update={"path": path, "revision": None, "init": "pretrained"})
    return _read(table.model_dump_json())


def _reference(inventory: Inventory, setup: Setup) -> OtherWeights:
    """Count the trained weights once more, as the engine stores them (`Engine.frozen_weights`)."""
    if not setup.keeps_reference:
        return OtherWeights()
    policy = inventory.policy
    held = _held(replace(policy, params=tuple(param for param in policy.params if param.trained)), setup)
    formula = f"{policy.trained:,} trained parameters as they were before, for beta; {_place(setup)}"
    return _placed("reference", held, formula, setup)


def _teacher(setup: Setup) -> OtherWeights:
    """Count a teacher's weights, cut as the trained model's, its head whole, and its hidden states of a step."""
    teacher = teacher_of(setup)
    if teacher is None:
        return OtherWeights()
    teacher = replace(teacher, params=tuple(replace(param, trained=False) for param in teacher.params))
    weights = _placed("teacher", _held(teacher, setup), f"{teacher.total:,} parameters; {_place(setup)}", setup)
    head = teacher.samples[-1].module.head.weight
    states_of_step = setup.tokens * setup.micros_per_step * head.shape[1] * teacher.item_bytes
    kept = head.numel() * teacher.item_bytes
    more = OtherWeights(
        device=kept + states_of_step,
        parts=(
            ("teacher's head", kept, f"{head.shape[0]:,} x {head.shape[1]:,} in {teacher.item_bytes} bytes, whole"),
            (
                "teacher's hidden states",
                states_of_step,
                f"{setup.micros_per_step} micro-batches x {setup.tokens:,} tokens x {head.shape[1]:,} in "
                f"{teacher.item_bytes} bytes",
            ),
        ),
    )
    traced = activations(teacher, tokens=setup.tokens, checkpointing="off", kernel=setup.kernel, loss=setup.head_loss)
    gathered = setup.footprint.gathered(teacher, setup.ranks).num_bytes
    return weights + more + OtherWeights(forward=gathered + traced.evaluation_block)


def _held(inventory: Inventory, setup: Setup) -> int:
    recipe = setup.recipe
    optim: Any = optimizer_of(recipe.method.spec, recipe.method.params, recipe.optim.spec)
    return states.of_rank(inventory, setup.engine, optim, recipe.optim.params, world=setup.shards).weights


def _placed(name: str, num_bytes: int, formula: str, setup: Setup) -> OtherWeights:
    if setup.offload == "all":
        return OtherWeights(host=num_bytes, parts=((name, 0, f"{formula}: {gib_text(num_bytes)}"),))
    return OtherWeights(device=num_bytes, parts=((name, num_bytes, formula),))


def _place(setup: Setup) -> str:
    where = "in host memory" if setup.offload == "all" else setup.footprint.storage(setup.shards)
    return f"{setup.engine}: {where}"


@functools.lru_cache(maxsize=4)
def _read(json: str) -> Inventory:
    table = ModelTable.model_validate_json(json)
    spec = METHODS[DEFAULT_PARTS["method"]]
    return inventories.read(table, skeleton.find_config(table), spec, spec.params())
