"""Every registered optimizer and schedule, against an independent statement of its rule."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distft.optim import MATRIX, OPTIMIZERS, SCHEDULES

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
    "adamw_4bit": (adam, 1e-1),
    "adamw_fp8": (adam, 1e-1),
    "lion": (lion, 1e-6),
}
"""Update direction, and how far the library may be from it after ten steps (moments of few bits round)."""


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


WIDE, TALL, BATCH = (32, 48), (48, 32), (3, 24, 40)
SETTINGS = {"muon": {}, "galore": {"rank": 4, "update_gap": 3}, "apollo": {"rank": 4, "update_gap": 3}}


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz, in bf16 as its authors': singular values near 1."""
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).float()


def muon(grad: Tensor, state: dict, step: int) -> Tensor:
    m = state["m"] = 0.95 * state.get("m", torch.zeros_like(grad)) + 0.05 * grad
    return orthogonal(0.05 * grad + 0.95 * m) * 0.2 * math.sqrt(max(grad.shape))


def galore(grad: Tensor, state: dict, step: int) -> Tensor:
    """Moments outlive a projection, so the signs of singular vectors matter: they are LAPACK's here and there."""
    tall = grad.shape[-2] >= grad.shape[-1]
    if (step - 1) % 3 == 0:
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        state["projector"] = right[..., :4, :].mT @ right[..., :4, :] if tall else left[..., :4] @ left[..., :4].mT
        state["basis"] = right[..., :4, :] if tall else left[..., :4]
    if tall:
        return 0.25 * adam(grad @ state["projector"] @ state["basis"].mT, state, step) @ state["basis"]
    return 0.25 * state["basis"] @ adam(state["basis"].mT @ state["projector"] @ grad, state, step)


RULES_OF_MATRICES = {"muon": (muon, (WIDE, TALL), 3e-3), "galore": (galore, (WIDE, TALL, BATCH), 1e-5)}
"""Largest difference after ten steps; bf16 inside Muon rounds otherwise in another order of operations."""


def of_matrices(
    name: str, shapes: tuple[tuple[int, ...], ...]
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Ten steps of some weight matrices and a vector: before, after, gradients."""
    spec, generator = OPTIMIZERS[name], torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in (*shapes, SMALL)]
    params = [torch.nn.Parameter(value.clone()) for value in start]
    groups = [
        {"params": params[:-1], "weight_decay": DECAY, MATRIX: True},
        {"params": params[-1:], "weight_decay": 0.0},
    ]
    optimizer = spec.build(spec.params(learning_rate=RATE, **SETTINGS[name]), groups)
    grads = []
    for _ in range(10):
        grads.append([torch.randn(shape, generator=generator) for shape in shapes])
        grads[-1].append(torch.randn(SMALL, generator=generator))
        for param, value in zip(params, grads[-1], strict=True):
            param.grad = value.clone()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
    return start, [param.detach() for param in params], grads


@pytest.mark.parametrize("name", RULES_OF_MATRICES)
def test_weight_matrices_have_a_rule_of_their_own(name: str) -> None:
    rule, shapes, bound = RULES_OF_MATRICES[name]
    start, after, grads = of_matrices(name, shapes)
    for index, value in enumerate(start):
        wanted, state, is_matrix = value.clone(), {}, index < len(shapes)
        for step, gradient in enumerate(grads, 1):
            direction = (rule if is_matrix else adam)(gradient[index], state, step)
            wanted = wanted * (1 - RATE * DECAY * is_matrix) - RATE * direction
        assert (wanted - value).abs().max() > 1e-2
        torch.testing.assert_close(after[index], wanted, rtol=0, atol=bound if is_matrix else 1e-6)


@pytest.mark.parametrize(("scale_by", "rank", "scale"), [("channel", 4, 1.0), ("tensor", 1, 128.0)])
def test_apollo_scales_gradients_as_adam_does(scale_by: str, rank: int, scale: float) -> None:
    """In a space of all dimensions the factors would be Adam's; here they are those of what it drew."""
    spec, generator = OPTIMIZERS["apollo"], torch.Generator().manual_seed(0)
    for shape in (WIDE, TALL, BATCH):
        param = torch.nn.Parameter(torch.zeros(shape))
        params = spec.params(learning_rate=RATE, rank=rank, scale=scale, scale_by=scale_by)
        optimizer = spec.build(params, [{"params": [param], "weight_decay": 0.0, MATRIX: True}])
        gradient = torch.randn(shape, generator=generator)
        param.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        factors = -param.detach() / (RATE * gradient)
        assert (factors > 0).all(), "each element moves against its gradient"
        over = {"tensor": (-2, -1), "channel": (-1,) if shape[-2] >= shape[-1] else (-2,)}[scale_by]
        spread = factors.amax(over) - factors.amin(over)
        assert (spread < 1e-4 * factors.amax(over)).all(), "one factor for a channel, or for a matrix"
        # Adam's first update is the sign of what it is given, and a random space keeps norms in expectation.
        count = rank * (max(shape[-2:]) if scale_by == "tensor" else 1)
        kept = math.sqrt(scale * count) / (factors.amax(over) * gradient.square().sum(over).sqrt())
        assert 0.5 < kept.mean() < 2


def test_apollo_grows_slowly_and_draws_anew() -> None:
    """An update's norm grows by 1 % a step at most; projections are drawn from the matrix's number and the turn."""
    spec = OPTIMIZERS["apollo"]
    twins = [torch.nn.Parameter(torch.zeros(WIDE)) for _ in range(2)]
    params = spec.params(learning_rate=RATE, rank=2, update_gap=2)
    optimizer = spec.build(params, [{"params": twins, "weight_decay": 0.0, MATRIX: True}])
    for group in optimizer.param_groups:
        group["lr"] = RATE
    gradient = torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    norms = []
    for sign in (1, -1, 1, -1, 1, 1, 1, 1):  # a momentum that cancels out, then one that adds up
        for twin in twins:
            twin.grad = gradient * sign
        optimizer.step()
        norms.append(float(optimizer.state[twins[0]]["update_norm"].squeeze()))
    growth = [later / earlier for earlier, later in pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)
    assert min(growth) < 1
    assert not torch.equal(*(twin.detach() for twin in twins)), "equal gradients in spaces of their own"


def test_matrix_states_are_as_large_as_planned() -> None:
    for name, settings in SETTINGS.items():
        spec = OPTIMIZERS[name]
        shapes = (WIDE, TALL) if spec.matrix_dims == 2 else (WIDE, TALL, BATCH)
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        chosen = spec.params(**settings)
        optimizer = spec.build(chosen, [{"params": params, "weight_decay": 0.0, MATRIX: True}])
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
        assert spec.matrix_state_bytes is not None
        for param, shape in zip(params, shapes, strict=True):
            kept = [value for value in optimizer.state[param].values() if isinstance(value, Tensor)]
            held = sum(value.numel() * value.element_size() for value in kept)
            assert held == spec.matrix_state_bytes(chosen, shape).per_tensor, (name, shape)


@pytest.mark.parametrize(("name", "library"), [("galore", "galore_torch"), ("apollo", "apollo_torch")])
def test_equals_its_authors_code(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their package is installed; it is not needed otherwise."""
    authors = pytest.importorskip(library)
    from distft.optim import matrix_steps

    def theirs(self: matrix_steps.ApolloStep, gradient: Tensor, state: dict, number: int) -> Tensor:
        """Draw what their code keeps."""
        from apollo_torch import random_projector  # pyright: ignore[reportMissingImports]

        seed = number
        for _ in range(state.get("step", 0) // 3):
            seed = random_projector.next_seed(seed)
        rows, columns = gradient.shape
        return random_projector.stable_randn((4, columns) if rows >= columns else (rows, 4), seed=seed) / 2

    monkeypatch.setattr(matrix_steps.ApolloStep, "_projection", theirs)
    start, after, grads = of_matrices(name, (WIDE, TALL))
    params = [torch.nn.Parameter(value.clone()) for value in start]
    kind = {"proj": "random", "scale_type": "channel", "scale": 1.0} if name == "apollo" else {"scale": 0.25}
    low = {"params": params[:2], "rank": 4, "update_proj_gap": 3, "proj_type": "std", **kind}
    made = {"galore": "GaLoreAdamW", "apollo": "APOLLOAdamW"}[name]
    groups = [low, {"params": params[2:]}]
    optimizer = getattr(authors, made)(groups, lr=RATE, eps=1e-8, no_deprecation_warning=True)
    for gradient in grads:
        with torch.no_grad():
            for param in params[:2]:
                param.mul_(1 - RATE * DECAY)  # theirs comes after the update
        for param, value in zip(params, gradient, strict=True):
            param.grad = value.clone()
        optimizer.step()
    for param, value in zip(params, after, strict=True):
        torch.testing.assert_close(value, param.detach(), rtol=1e-5, atol=1e-5)  # epsilon lies elsewhere in theirs


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
