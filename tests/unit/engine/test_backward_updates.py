"""Updates in the backward pass: what the engine holds meanwhile, what is refused, and what a plan counts."""

import dataclasses
from pathlib import Path

import pytest
import torch
from plan_kit import recipe_of
from tiny import CPU, batch, build, documents

from distft.core.errors import MachineError, NumericError, RecipeError
from distft.core.types import LossTerms, TrainState, UpdateRule
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine, open_engine

ALONE = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)
AFTER = UpdateRule(
    build=lambda groups: torch.optim.AdamW(groups, lr=1.0),
    lr_at=lambda step: 0.01 / (step + 1),
    weight_decay=0.1,
    decayed=frozenset(),
    max_grad_norm=None,
    per_tensor=True,
)
INSIDE = dataclasses.replace(AFTER, in_backward=True)
MICRO = batch(documents([20, 9]))


def opened(folder: Path, rule: UpdateRule, *, micros: int = 1, dtype: str = "bfloat16") -> SoloEngine:
    engine = open_engine("solo", EngineParams(), ALONE)
    engine.setup(build(folder, fill=False, dtype=dtype), rule, micros_per_step=micros)
    return engine


def weights(engine: SoloEngine) -> list[torch.Tensor]:
    return [param.detach().clone() for param in engine.model.parameters()]


def backward(engine: SoloEngine, factor: float = 1.0) -> None:
    with engine.accumulating(last=True, seed=0):
        loss = engine.model(**MICRO.inputs()).sum() * factor
        engine.backward(LossTerms(loss_sum=loss), divide_by=MICRO.num_supervised, samples=("row 1",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_gradient_is_left_and_the_bits_are_the_same(tiny_config: Path, dtype: str) -> None:
    after, inside = opened(tiny_config, AFTER, dtype=dtype), opened(tiny_config, INSIDE, dtype=dtype)
    for step in range(3):
        state = TrainState(step=step)
        for engine in (after, inside):
            backward(engine)
        assert all(param.grad is not None for param in after.model.parameters())
        assert all(param.grad is None for param in inside.model.parameters())
        assert all(master.grad is None for _, master in inside._owned)
        reports = [engine.step(state, MICRO.num_supervised, lambda loss: True) for engine in (after, inside)]
        assert reports[0] == reports[1]
        assert reports[1].updated
        assert all(torch.equal(one, other) for one, other in zip(weights(after), weights(inside), strict=True))


def test_a_loss_that_is_not_finite_changes_no_weight(tiny_config: Path) -> None:
    engine = opened(tiny_config, INSIDE)
    before = weights(engine)
    backward(engine, float("nan"))
    report = engine.step(TrainState(), MICRO.num_supervised, lambda loss: True)
    assert not report.updated
    assert report.samples == "rank 0: row 1"
    assert all(torch.equal(one, other) for one, other in zip(before, weights(engine), strict=True))
    assert all(param.grad is None for param in engine.model.parameters())


def test_a_gradient_that_is_not_finite_says_that_weights_were_changed(tiny_config: Path) -> None:
    engine = opened(tiny_config, INSIDE, dtype="float32")
    backward(engine)
    engine.step(TrainState(), MICRO.num_supervised, lambda loss: True)
    middle = engine.model.transformer.model.layers[1].mlp.down_proj.weight
    middle.register_hook(lambda gradient: gradient * float("inf"))
    backward(engine)
    with pytest.raises(
        NumericError, match=r"step 2: gradient norm (inf|nan) though the loss is finite, and weights were"
    ):
        engine.step(TrainState(step=1), MICRO.num_supervised, lambda loss: True)


def test_another_step_than_its_rate_is_refused(tiny_config: Path) -> None:
    engine = opened(tiny_config, INSIDE)
    backward(engine)
    with pytest.raises(MachineError, match="step 8 was updated with the rate of step 1"):
        engine.step(TrainState(step=7), MICRO.num_supervised, lambda loss: True)


def test_sums_and_clipping_are_refused_by_the_engine_too(tiny_config: Path) -> None:
    for rule, micros in ((INSIDE, 2), (dataclasses.replace(INSIDE, max_grad_norm=1.0), 1)):
        with pytest.raises(MachineError, match="takes one micro-batch a step"):
            opened(tiny_config, rule, micros=micros)


ON = ("train.optimizer_in_backward=true", 'train.max_grad_norm="off"', "train.micro_batch_size=4",
      "train.global_batch_size=4")  # fmt: skip
REFUSED = {
    "clipping": (('train.max_grad_norm=0.5',), "max_grad_norm = 0.5 scales them by the norm of all"),
    "spikes": (("guard.loss_spike={}",), "a step that spikes could not be left out"),
    "rehearsal": (("train.rehearse=true",), "a rehearsal could not be thrown away"),
    "adalora": (('method.name="adalora"',), 'method "adalora" looks at all tensors at once'),
    "ddp": (('engine.name="ddp"',), "engine ddp adds them up over ranks .* one of the engines solo, fsdp2"),
    "zero3": (('engine.name="zero3"',), "engine zero3 adds them up"),
    "offload": (('engine.name="fsdp2"', 'engine.offload="all"'), r"\[engine\] offload moves or keeps them"),
    "gather": (('engine.name="fsdp2"', 'engine.gather="once_a_step"'), r"\[engine\] gather moves or keeps them"),
    "sums in fp32": (('engine.name="solo"', 'engine.grad_dtype="float32"'), "sums in fp32 are kept"),
    "rollouts": (('objective.name="grpo"', 'rollout.rewards=[{name="exact_match"}]'), "on rollouts take several"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused_with_its_key(tmp_path: Path, name: str) -> None:
    overrides, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_of(tmp_path, *ON, *overrides)
    assert "optimizer_in_backward" in str(caught.value)
