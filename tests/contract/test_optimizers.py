"""Every registered optimizer and schedule, against an independent statement of its rule."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distft.optim import OPTIMIZERS, SCHEDULES

RATE, DECAY = 1e-2, 0.1
BIG, SMALL = (128, 64), (64,)  # 8-bit state starts at 4,096 elements


def adam(grad: Tensor, state: dict, step: int) -> Tensor:
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    return (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


def lion(grad: Tensor, state: dict, step: int) -> Tensor:
    m = state.get("m", torch.zeros_like(grad))
    state["m"] = 0.99 * m + 0.01 * grad
    return (0.9 * m + 0.1 * grad).sign()


RULES: dict[str, tuple[Callable, float]] = {
    "adamw": (adam, 1e-6),
    "paged_adamw_32bit": (adam, 1e-6),
    "adamw_8bit": (adam, 1e-2),
    "paged_adamw_8bit": (adam, 1e-2),
    "lion": (lion, 1e-6),
}
"""Update direction, and how far the library may be from it after ten steps (8-bit moments round)."""


def run(name: str, steps: int = 10) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    spec = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in (BIG, SMALL)]
    params = [torch.nn.Parameter(value.clone()) for value in start]
    groups = [{"params": [params[0]], "weight_decay": DECAY}, {"params": [params[1]], "weight_decay": 0.0}]
    optimizer = spec.build(spec.params(learning_rate=RATE, weight_decay=DECAY), groups)
    grads = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(steps)]
    for gradient in grads:
        for param, value in zip(params, gradient, strict=True):
            param.grad = value.clone()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
    return start, [p.detach() for p in params], grads


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name in RULES])
def test_equals_its_rule(name: str) -> None:
    rule, bound = RULES[name]
    start, got, grads = run(name)
    for index, (value, decay) in enumerate(zip(start, (DECAY, 0.0), strict=True)):
        wanted, state = value.clone(), {}
        for step, gradient in enumerate(grads, 1):
            wanted = wanted * (1 - RATE * decay) - RATE * rule(gradient[index], state, step)
        off = (got[index] - wanted).abs()  # elements move by up to 10 x RATE = 0.1
        assert off.max() < bound
        assert off.mean() < bound / 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_against_the_gradient_and_decays_only_its_group(name: str) -> None:
    spec = OPTIMIZERS[name]
    value = torch.nn.Parameter(torch.full(BIG, 3.0))
    still = torch.nn.Parameter(torch.full(SMALL, 3.0))
    groups = [{"params": [value], "weight_decay": 0.0}, {"params": [still], "weight_decay": 0.0}]
    optimizer = spec.build(spec.params(learning_rate=RATE), groups)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * value.square().sum()).backward()
        still.grad = torch.zeros_like(still)
        optimizer.step()
    assert (value < 3.0).all()
    assert torch.equal(still.detach(), torch.full(SMALL, 3.0)), "no gradient, no decay, no movement"


def test_8bit_state_is_8bit() -> None:
    spec = OPTIMIZERS["adamw_8bit"]
    param = torch.nn.Parameter(torch.randn(BIG))
    optimizer = spec.build(spec.params(), [{"params": [param], "weight_decay": 0.0}])
    param.grad = torch.randn(BIG)
    optimizer.step()
    assert optimizer.state[param]["state1"].dtype == torch.uint8


# -- schedules -------------------------------------------------------------------------------------------------------

TOTAL = 40


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_and_stay_within_bounds(name: str) -> None:
    spec = SCHEDULES[name]
    factor = spec.build(spec.params(warmup_steps=4), TOTAL)
    values = [factor(step) for step in range(TOTAL)]
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(0 < value <= 1 for value in values)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values[4:]))
    assert spec.build(spec.params(warmup_ratio=0.1), TOTAL)(1) == pytest.approx(0.5)


def test_schedules_equal_their_formulas() -> None:
    def at(name: str, step: int, **settings: float) -> float:
        spec = SCHEDULES[name]
        return spec.build(spec.params(**settings), TOTAL)(step)

    assert at("constant", 39) == 1.0
    assert at("linear", 10) == pytest.approx(0.75)
    assert at("linear", 39, min_ratio=0.2) == pytest.approx(0.2 + 0.8 / 40)
    assert at("cosine", 20) == pytest.approx(0.5)
    assert at("cosine", 22, warmup_steps=4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 18 / 36)))
    assert at("wsd", 29, decay_ratio=0.25) == 1.0
    assert at("wsd", 35, decay_ratio=0.25) == pytest.approx(0.5)


def test_schedules_agree_with_transformers() -> None:
    """Behind the warm-up, which transformers starts from zero."""
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, theirs in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = theirs(optimizer, num_warmup_steps=5, num_training_steps=TOTAL)
        ours = SCHEDULES[name].build(SCHEDULES[name].params(warmup_steps=5), TOTAL)
        for step in range(TOTAL):
            if step >= 5:
                assert schedule.get_last_lr()[0] == pytest.approx(ours(step)), (name, step)
            optimizer.step()
            schedule.step()
