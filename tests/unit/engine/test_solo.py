"""The reference engine: what the optimizer sees, what a bad number stops, and what seeds dropout."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny import CPU, batch, build, documents
from torch import nn

from distft.core.types import Batch, LossTerms, TrainState, UpdateRule
from distft.engine.master_weights import MasterWeights
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine, open_engine

ALONE = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)
RULE = UpdateRule(
    build=lambda groups: torch.optim.AdamW(groups, lr=1.0),
    lr_at=lambda step: 0.1 / (step + 1),
    weight_decay=0.1,
    decayed=frozenset(),
    max_grad_norm=1.0,
)


def opened(folder: Path, method: str = "full", **how) -> SoloEngine:
    engine = open_engine("solo", EngineParams(), ALONE)
    engine.setup(build(folder, method, fill=False, **how), RULE, micros_per_step=1)
    return engine


def bits(engine: SoloEngine) -> dict[str, torch.Tensor]:
    """Every parameter's bytes: NaN equals itself here."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in engine.model.named_parameters()}


def named(ids: list[list[int]], *samples: str) -> Batch:
    return dataclasses.replace(batch(ids), sample_ids=samples)


def forward_backward(engine: SoloEngine, micro: Batch, *, weight: float, seed: int = 0) -> float:
    with engine.accumulating(last=True, seed=seed):
        loss = engine.model(**engine.place(micro).inputs()).sum()
        engine.backward(LossTerms(loss_sum=loss), divide_by=weight, samples=micro.sample_ids)
    return loss.item()


# -- the tensors an optimizer updates --------------------------------------------------------------------------------


def test_fp32_parameters_are_updated_in_place() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    owned = MasterWeights(layer.named_parameters())
    [(name, tensor)] = owned
    seen: list = []
    assert name == "weight"
    assert tensor is layer.weight, "no copy, and nothing for what is frozen"
    layer(torch.ones(1, 3)).sum().backward()
    [grad] = owned.gradients()
    assert grad.data_ptr() == layer.weight.grad.data_ptr()
    owned.update(lambda masters: seen.extend(masters[0].grad.tolist()))
    assert seen == grad.tolist(), "no copy, so the tensor that the optimizer sees is this one"
    assert layer.weight.grad is None
    owned.copy_to_model()


def test_bf16_parameters_have_fp32_masters() -> None:
    layer = nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    owned = MasterWeights(layer.named_parameters())
    [(_, master)] = owned
    seen: list = []
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), layer.weight)
    assert owned.gradients() == [], "no gradient yet"
    layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    [grad] = owned.gradients()
    assert grad.dtype == torch.bfloat16
    owned.update(lambda masters: seen.append((masters[0].grad.dtype, layer.weight.grad)))
    assert seen == [(torch.float32, None)], "moved, not kept twice"
    assert master.grad is None
    for _ in range(100):
        with torch.no_grad():
            master.add_(2**-12)  # lost each time in bf16, whose next number after 1 is 1 + 2**-7
        owned.copy_to_model()
    assert torch.equal(master.detach(), torch.full((2, 4), 1 + 100 * 2**-12))
    assert torch.equal(layer.weight.detach(), torch.full((2, 4), 1 + 3 * 2**-7, dtype=torch.bfloat16))


# -- one step --------------------------------------------------------------------------------------------------------


def test_a_step_reports_what_it_did(tiny_config: Path) -> None:
    engine = opened(tiny_config)
    before = bits(engine)
    micros = [batch(documents([20, 9])), batch(documents([14], seed=1))]
    weight = float(sum(micro.num_supervised for micro in micros))
    losses = [forward_backward(engine, micro, weight=weight) for micro in micros]
    grads = torch.cat([p.grad.flatten() for p in engine.model.parameters()])
    asked = []
    report = engine.step(TrainState(step=3), weight, lambda loss: not asked.append(loss))
    assert asked == [report.loss]
    assert report.updated
    assert report.step == 4
    assert report.loss == pytest.approx(sum(losses) / weight, rel=1e-6)
    assert report.grad_norm == pytest.approx(grads.norm().item(), rel=1e-5)
    assert report.grad_norm > 1.0, "before clipping"
    assert report.lr == pytest.approx(0.1 / 4)
    after = bits(engine)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in engine.model.parameters())


@pytest.mark.row(22)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_changes_no_weight_and_names_its_rows(tiny_config: Path, dtype: str) -> None:
    engine = opened(tiny_config, dtype=dtype)
    with torch.no_grad():
        engine.model.get_parameter("lm.model.embed_tokens.weight")[7] = float("nan")
    before = bits(engine)
    good, bad = documents([12, 9]), [[7, 7, 7, 7], *documents([10], seed=3)]
    good = [[max(8, token) for token in row] for row in good]
    forward_backward(engine, named(good, "train.jsonl row 1", "train.jsonl row 2"), weight=30.0)
    forward_backward(engine, named(bad, "train.jsonl row 3", "train.jsonl row 9"), weight=30.0)
    report = engine.step(TrainState(step=4), 30.0, lambda loss: pytest.fail("there is nothing to accept"))
    assert (report.step, report.updated) == (5, False)
    assert math.isnan(report.loss)
    assert report.samples == "rank 0: train.jsonl row 3, train.jsonl row 9"
    after = bits(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in engine.model.parameters())


@pytest.mark.row(23)
def test_gradients_that_overflow_change_no_weight(tiny_config: Path) -> None:
    engine = opened(tiny_config)
    engine.model.get_parameter("lm.lm_head.weight").register_hook(lambda grad: grad * float("inf"))
    before = bits(engine)
    forward_backward(engine, named(documents([12]), "train.jsonl row 1"), weight=11.0)
    report = engine.step(TrainState(), 11.0, lambda loss: True)
    assert not report.updated
    assert math.isfinite(report.loss)
    assert not math.isfinite(report.grad_norm)
    after = bits(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_step_that_is_not_accepted_changes_nothing_and_the_next_one_is_clean(tiny_config: Path) -> None:
    engine, other = opened(tiny_config), opened(tiny_config)
    forward_backward(engine, named(documents([12]), "a"), weight=11.0)
    forward_backward(engine, named(documents([30], seed=2), "b"), weight=11.0)
    report = engine.step(TrainState(), 11.0, lambda loss: False)
    assert not report.updated
    assert report.samples == "rank 0: b", "the micro-batch with the largest loss"
    for one in (engine, other):
        forward_backward(one, named(documents([9]), "c"), weight=8.0)
        assert one.step(TrainState(step=1), 8.0, lambda loss: True).updated
    a, b = bits(engine), bits(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dropout_depends_on_the_micro_batchs_seed_only(tiny_config: Path) -> None:
    """Not on what was drawn before: so it repeats after a resume and on another world size."""
    engine = opened(tiny_config, "lora", params={"r": 4, "dropout": 0.5})
    with torch.no_grad():
        for name, param in engine.model.named_parameters():
            if ".lora_B." in name:
                param.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    micro = batch(documents([25, 8]))
    first = forward_backward(engine, micro, weight=1.0, seed=10)
    other = forward_backward(engine, micro, weight=1.0, seed=11)
    torch.manual_seed(999)
    torch.rand(1000)
    assert forward_backward(engine, micro, weight=1.0, seed=10) == first
    assert other != first
    with engine.evaluating():
        off = [engine.model(**micro.inputs()).sum().item() for _ in range(2)]
    assert off[0] == off[1] != first
    assert engine.model.training, "dropout is on again after an evaluation"


# -- weights of before, beside the trained ones ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), [("full", "float32"), ("full", "bfloat16"), ("lora", "float32")])
def test_frozen_weights_stand_in_and_go_again(tiny_config: Path, method: str, dtype: str) -> None:
    engine, micro = opened(tiny_config, method, dtype=dtype), batch(documents([9, 5]))

    def losses() -> torch.Tensor:
        with engine.evaluating():
            return engine.model(**engine.place(micro).inputs(), per_token=True)

    def train(step: int) -> None:
        forward_backward(engine, micro, weight=12)
        engine.step(TrainState(step=step), 12, lambda loss: True)

    before, frozen = losses(), engine.frozen_weights(lambda name: True)
    train(0)
    after, weights = losses(), bits(engine)
    assert not torch.equal(before, after)
    with frozen():
        assert torch.equal(losses(), before)
    with pytest.raises(TypeError), frozen():
        engine.model(None)
    assert all(torch.equal(new, weights[name]) for name, new in bits(engine).items())
    assert torch.equal(losses(), after)
    with frozen():
        assert torch.equal(losses(), before), "a second time, too"
    train(1)
    again = opened(tiny_config, method, dtype=dtype)
    for step in range(2):
        forward_backward(again, micro, weight=12)
        again.step(TrainState(step=step), 12, lambda loss: True)
    assert all(torch.equal(new, bits(again)[name]) for name, new in bits(engine).items()), "training never noticed"
