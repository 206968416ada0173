"""`auto` picks what an expert would and says why; what cannot be is refused with the way out."""

import importlib.util
from typing import Any

import pytest
import torch

from distft.core.errors import MachineError
from distft.engine import ENGINES
from distft.engine.auto import choose
from distft.engine.processes import Processes

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def chosen(
    name: str = "auto",
    *,
    world: int = 2,
    wants: str = "",
    offloads: bool = False,
    trains_all: bool = True,
    **asked: Any,
):
    placed = Processes(
        rank=0, world=world, local_rank=0, device=torch.device("cpu"), launcher="torchrun", wants=wants,
        wants_offload=offloads, joined=False,
    )  # fmt: skip
    return choose(name, ENGINES, placed, trains_all=trains_all, **({"elementwise": True} | asked))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Makes a package look as if it were not installed."""
    real = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))

    return hide


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("asked", "engine", "why"),
    [
        ({"world": 1}, "solo", "one process"),
        ({"world": 1, "trains_all": False}, "solo", "one process"),
        ({"world": 1, "trains_all": False, "offload": "optimizer"}, "zero3", "offload was asked for"),
        ({"world": 1, "elementwise": False}, "solo", "one process"),
        ({}, "zero3", "all weights are trained, so optimizer state is sharded"),
        ({"offload": "all"}, "zero3", "all weights are trained, so optimizer state is sharded"),
        ({"trains_all": False}, "ddp", "only adapters are trained: sharding them saves nothing and costs traffic"),
        ({"trains_all": False, "offload": "all"}, "zero3", "offload was asked for"),
        ({"elementwise": False}, "ddp", "the optimizer needs whole matrices"),
        ({"wants": "deepspeed", "trains_all": False}, "zero3", "accelerate launch was configured for deepspeed"),
        ({"wants": "zero1"}, "zero1", "accelerate launch was configured for zero1"),
        ({"name": "zero3", "wants": "zero1"}, "zero3", "the recipe names it"),
        ({"wants": "fsdp", "world": 1}, "fsdp2", "accelerate launch was configured for fsdp"),
        ({"name": "ddp", "world": 4}, "ddp", "the recipe names it"),
        ({"name": "solo", "world": 1}, "solo", "the recipe names it"),
        ({"name": "zero1", "wants": "deepspeed"}, "zero1", "the recipe names it"),
        ({"name": "fsdp2", "wants": "fsdp"}, "fsdp2", "the recipe names it"),
    ],
    ids=str,
)
def test_the_choice_and_its_reason(asked: dict[str, Any], engine: str, why: str) -> None:
    assert chosen(**asked) == (engine, why)


def test_without_deepspeed_fsdp2_shards(without) -> None:
    without("deepspeed")
    assert chosen() == (
        "fsdp2",
        "all weights are trained, so optimizer state is sharded (DeepSpeed is not installed)",
    )
    assert chosen(offload="all")[0] == "fsdp2"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_named_engine_whose_library_is_missing(name: str, without) -> None:
    without("deepspeed")
    with pytest.raises(MachineError, match=f"engine {name} needs deepspeed, which is not installed: pip install deep"):
        chosen(name)


@pytest.mark.parametrize(
    ("name", "wants", "said"),
    [
        ("ddp", "deepspeed", r"--use_deepspeed, but .* name = 'ddp': launch without .*engine to zero1, zero2 or zero3"),
        ("solo", "fsdp", r"--use_fsdp, but .* name = 'solo': launch without --use_fsdp .*set the engine to fsdp2"),
        ("fsdp2", "deepspeed", r"--use_deepspeed, but the recipe says \[engine\] name = 'fsdp2'"),
        ("zero3", "fsdp", r"--use_fsdp, but the recipe says \[engine\] name = 'zero3'"),
    ],
)
def test_launcher_and_recipe_disagree(name: str, wants: str, said: str) -> None:
    with pytest.raises(MachineError, match=said):
        chosen(name, wants=wants)


def test_solo_is_one_process() -> None:
    with pytest.raises(MachineError, match=r'engine solo runs in 1 process, 2 were started: .*"auto" or "ddp"'):
        chosen("solo")


@pytest.mark.row(32)
@NEEDS_DEEPSPEED
@pytest.mark.parametrize("wants", ["deepspeed", "fsdp"])
def test_an_optimizer_of_whole_matrices_is_not_given_pieces(wants: str) -> None:
    """The recipe's rules see named engines only; here the launcher picked one."""
    with pytest.raises(MachineError, match=f"configured for {wants}.* gives each rank pieces of matrices, and the opt"):
        chosen(wants=wants, elementwise=False)


@NEEDS_DEEPSPEED
def test_offload_is_done_or_refused_never_dropped(without) -> None:
    with pytest.raises(MachineError, match=r'engine ddp \(the optimizer needs whole .*\) cannot offload = "all": rem'):
        chosen(elementwise=False, offload="all")
    without("deepspeed")
    with pytest.raises(MachineError, match=r'engine fsdp2 .*cannot offload = "optimizer".*zero3'):
        chosen(offload="optimizer")


@NEEDS_DEEPSPEED
def test_a_launch_file_that_offloads_under_a_recipe_that_does_not() -> None:
    with pytest.raises(MachineError, match=r'set \[engine\] offload = "optimizer", or take it out of the launch file'):
        chosen(wants="zero3", offloads=True)
    assert chosen(wants="zero3", offloads=True, offload="optimizer")[0] == "zero3"
