"""`auto` fills the memory there is, and no more; the job takes what the plan says, and on a CPU the old rule."""

from pathlib import Path

import pytest
from plan_kit import read, recipe_of

from distft import assemble
from distft.core.accelerators import GIB, named
from distft.core.errors import RecipeError
from distft.plan import auto_setup, memory
from distft.plan.auto_setup import ROOM, AutoSetup
from distft.plan.machine import of_size
from distft.plan.setup import Machine


def choose(model: Path, gib: float, *overrides: str) -> AutoSetup:
    recipe = recipe_of(model, 'method.name="lora"', *overrides)
    machine = Machine(gpu=of_size(gib), gpus_per_node=1)
    return auto_setup.choose(recipe, read(recipe), machine, engine="ddp", liger=False)


@pytest.mark.slow
def test_more_memory_means_less_recomputation(llama8b: Path) -> None:
    order = ["full", "selective", "off"]
    modes = [order.index(choose(llama8b, gib, "train.micro_batch_size=1").checkpointing) for gib in (22, 36, 80)]
    assert modes == sorted(modes)
    assert modes[0] < modes[-1]


@pytest.mark.parametrize("gib", [22, 40, 80, 140])
def test_what_is_chosen_fits(llama8b: Path, gib: float) -> None:
    found = choose(llama8b, gib)
    assert memory.of_setup(read(found.setup.recipe), found.setup).peak <= ROOM * gib * GIB
    assert 64 % found.micro_batch_size == 0
    assert "fits" in found.reason


def test_when_nothing_fits_the_smallest_is_named_as_such(llama8b: Path) -> None:
    found = choose(llama8b, 8)
    assert (found.micro_batch_size, found.checkpointing) == (1, "full")
    assert found.reason.startswith("nothing fits 7.5 GiB")


def test_the_recipes_own_values_stand(llama8b: Path) -> None:
    found = choose(llama8b, 80, "train.micro_batch_size=2", 'train.activation_checkpointing="full"')
    assert (found.micro_batch_size, found.checkpointing) == (2, "full")


def test_a_batch_that_does_not_split_is_refused(llama8b: Path) -> None:
    recipe = recipe_of(llama8b, "train.global_batch_size=3")
    two = Machine(gpu=named("h100-80gb"), gpus_per_node=2)
    with pytest.raises(RecipeError, match="do not split evenly"):
        auto_setup.choose(recipe, read(recipe), two, engine="zero3", liger=False)


def test_adapters_under_zero3_are_never_selective(llama8b: Path) -> None:
    recipe = recipe_of(llama8b, 'method.name="lora"', 'engine.name="zero3"')
    for gib in (8, 24, 40):
        machine = Machine(gpu=of_size(gib), gpus_per_node=8)
        found = auto_setup.choose(recipe, read(recipe), machine, engine="zero3", liger=False)
        assert found.checkpointing in ("off", "full")


def test_on_a_cpu_the_micro_batch_fills_8192_tokens(llama8b: Path) -> None:
    cut = assemble.choose_layout(recipe_of(llama8b), 2)
    assert (cut.micro_batch_size, cut.micros_per_step, cut.checkpointing) == (2, 16, None)


def test_on_accelerators_the_job_asks_the_planner(llama8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(gpu=of_size(80), gpus_per_node=1)
    monkeypatch.setattr(assemble.batch_layout, "_accelerators", lambda world: machine)
    recipe = recipe_of(llama8b, 'method.name="lora"')
    cut = assemble.choose_layout(recipe, 1)
    planned = auto_setup.choose(recipe, read(recipe), machine, engine="solo", liger=False)
    assert (cut.micro_batch_size, cut.checkpointing) == (planned.micro_batch_size, planned.checkpointing)
    assert cut.micros_per_step * cut.micro_batch_size == 64
    fixed = assemble.choose_layout(
        recipe_of(llama8b, "train.micro_batch_size=4", 'train.activation_checkpointing="selective"'), 1
    )
    assert (fixed.micro_batch_size, fixed.checkpointing) == (4, None), "nothing is auto: the planner is not asked"
