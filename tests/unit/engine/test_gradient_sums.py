"""Sums of a step's gradients in fp32, and updates that take a group of tensors at a time."""

import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, batch, build, documents
from torch import Tensor, nn

from distft.core.types import LossTerms, TrainState, UpdateRule
from distft.engine import master_weights
from distft.engine.ddp import AveragedSums
from distft.engine.grad_dtype import BF16_ERRORS, keeps_fp32_gradients
from distft.engine.gradient_sums import GradientSums
from distft.engine.master_weights import MasterWeights
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine, open_engine
from distft.engine.update_groups import update_groups
from distft.optim import OPTIMIZERS

ALONE = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)


# -- sums ------------------------------------------------------------------------------------------------------------


def summed(micros: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    """(what an engine's own parameter ends with, exact sum) of so many small gradients around one value."""
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    sums = GradientSums(layer.parameters()) if apart else None
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(micros):
        inputs = (1.76e-3 * (1 + 0.05 * torch.randn(1, 64, generator=generator))).bfloat16()
        layer(inputs).sum().backward()
        exact += inputs.double()
    [found] = MasterWeights(layer.named_parameters(), sums=sums).gradients()
    return found.double(), exact


def test_512_small_gradients_are_biased_in_bf16_and_not_in_fp32() -> None:
    ours, exact = summed(512, apart=True)
    assert (ours - exact).norm() < 1e-5 * exact.norm()
    theirs, exact = summed(512, apart=False)
    assert theirs.sum() < 0.8 * exact.sum(), "later gradients fall below the sum's last bit"
    assert (theirs - exact).norm() > 0.2 * exact.norm()


def test_a_gradient_is_freed_as_soon_as_it_is_added() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.bias.requires_grad_(False)
    sums = GradientSums(layer.parameters())
    assert sums.of(layer.weight) is None
    for count in (1, 2):
        layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is None
        assert torch.equal(sums.of(layer.weight), torch.full((8, 8), float(count)))
    sums.drop(layer.weight)
    assert sums.of(layer.weight) is None


def test_sums_keep_no_model_alive() -> None:
    """Many runs of one Python process would else keep all their weights."""
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    sums = AveragedSums(layer.parameters(), world=1)
    layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    gone = weakref.ref(layer.weight)
    del layer, sums
    gc.collect()
    assert gone() is None


def test_fp32_parameters_are_left_to_autograd() -> None:
    layer = nn.Linear(8, 8)
    sums = GradientSums(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    assert sums.of(layer.weight) is None
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("said", "half", "micros", "kept"),
    [
        ("auto", True, 1, False), ("auto", True, 2, True), ("auto", False, 64, False), ("float32", True, 1, True),
        ("float32", False, 2, False), ("bfloat16", True, 64, False),
    ],
)  # fmt: skip
def test_where_gradients_are_kept_in_fp32(said: Any, half: bool, micros: int, kept: bool) -> None:
    assert keeps_fp32_gradients(said, half=half, micros_per_step=micros) == kept


def adopted(folder: Path, *, micros: int, grad_dtype: Any = "auto", method: str = "full", **how: Any) -> SoloEngine:
    rule = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=1.0),
        lr_at=lambda step: 1.0,
        weight_decay=0.0,
        decayed=frozenset(),
        max_grad_norm=None,
        per_tensor=True,
    )
    engine = open_engine("solo", EngineParams(grad_dtype=grad_dtype), ALONE)
    engine.setup(build(folder, method, fill=False, dtype="bfloat16", **how), rule, micros_per_step=micros)
    return engine


def masters(engine: SoloEngine) -> dict[str, Tensor]:
    found = {piece.name: piece.data.clone() for piece in engine.pieces() if piece.name.startswith("param/")}
    assert found
    return found


def step_of(engine: SoloEngine, micros: int, *, accepts: bool = True) -> tuple[dict[str, Tensor], float]:
    """(minus the step's gradient, its norm): the update is that of SGD at rate 1, nothing clipped."""
    before = masters(engine)
    for index in range(micros):
        micro = batch(documents([20, 9], seed=index % 4))
        with engine.accumulating(last=index == micros - 1, seed=0):
            engine.backward(
                LossTerms(loss_sum=engine.model(**micro.inputs()).sum()), divide_by=27.0 * micros, samples=()
            )
    report = engine.step(TrainState(), 27.0 * micros, lambda loss: accepts)
    assert report.updated == accepts
    return {name: value - before[name] for name, value in masters(engine).items()}, report.grad_norm


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_gradient_of_many_micro_batches_is_that_of_a_plain_loop(tiny_config: Path, method: str) -> None:
    """The plain loop adds every micro-batch's bf16 gradient in fp64."""
    micros = 48
    engine = adopted(tiny_config, micros=micros, method=method)
    plain = build(tiny_config, method, dtype="bfloat16").module
    exact: dict[str, Tensor] = {}
    for index in range(micros):
        loss = plain(**batch(documents([20, 9], seed=index % 4)).inputs()).sum()
        (loss * (1 / (27.0 * micros))).backward()
        for name, param in plain.named_parameters():
            if param.grad is not None:
                exact[name] = exact.get(name, 0) + param.grad.double()
                param.grad = None
    norm = torch.cat([value.flatten() for value in exact.values()]).norm()
    moved, said = step_of(engine, micros)
    assert said == pytest.approx(norm.item(), rel=1e-5)
    error = sum((moved[f"param/{n}"].double().view_as(g) + g).square().sum() for n, g in exact.items()) ** 0.5
    assert error < 1e-4 * norm
    lossy, _ = step_of(adopted(tiny_config, micros=micros, method=method, grad_dtype="bfloat16"), micros)
    error = sum((lossy[f"param/{n}"].double().view_as(g) + g).square().sum() for n, g in exact.items()) ** 0.5
    assert error > 3e-3 * norm, "bf16 sums are what this tells apart"


def test_a_step_that_is_left_out_leaves_nothing_to_the_next(tiny_config: Path) -> None:
    engine, other = adopted(tiny_config, micros=2), adopted(tiny_config, micros=2)
    moved, _ = step_of(engine, 2, accepts=False)
    assert not any(change.any() for change in moved.values())
    step_of(engine, 2)
    step_of(other, 2)
    ours, theirs = masters(engine), masters(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_many_bf16_sums_are_warned_of_once(tiny_config: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adopted(tiny_config, micros=32, grad_dtype="bfloat16")
        adopted(tiny_config, micros=100)
        assert not caplog.messages
        engine = adopted(tiny_config, micros=100, grad_dtype="bfloat16")
        step_of(engine, 2)
    [said] = caplog.messages
    assert "100 micro-batches per step" in said
    assert dict(BF16_ERRORS)[128] in said


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numels", "groups"),
    [
        ([], []), ([3], [[0]]), ([3, 4, 3], [[0, 1], [2]]), ([9, 1, 6], [[0], [1, 2]]),
        ([1, 9, 9, 1, 1], [[0], [1], [2], [3, 4]]), ([0, 9, 0], [[0, 1], [2]]), ([7, 7], [[0], [1]]),
    ],
)  # fmt: skip
def test_groups_are_neighbours_of_limited_size(numels: list[int], groups: list[list[int]]) -> None:
    found = [list(group) for group in update_groups(numels, 7)]
    assert found == groups
    assert list(itertools.chain(*found)) == list(range(len(numels)))


class Stack(nn.Module):
    """Tensors of several shapes and sizes, 8-bit ones and small ones among them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(128, 64), (64,), (48, 100), (100,), (3, 7), (96, 96)]
        self.values = nn.ParameterList(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


def trained(name: str, dtype: torch.dtype, *, sums: bool, per_tensor: bool, limit: int) -> tuple[list, list]:
    """(weights and masters, optimizer state) after three clipped steps."""
    stack, spec = Stack(dtype), OPTIMIZERS[name]
    kept = GradientSums(stack.parameters()) if sums else None
    ours = MasterWeights(stack.named_parameters(), sums=kept, per_tensor=per_tensor, limit=limit)
    flats = [flat for _, flat in ours]
    pairs = ([f for f in flats if f.ndim > 1], 0.1), ([f for f in flats if f.ndim < 2], 0.0)
    optimizer = spec.build(spec.params(), [{"params": each, "weight_decay": decay} for each, decay in pairs])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for _ in range(2):
            sum((p * torch.randn(p.shape, generator=generator).to(dtype)).sum() for p in stack.values).backward()
        norm = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in ours.gradients()]))

        def step(group: list[nn.Parameter], norm: Tensor = norm) -> None:
            assert all(flat.grad is not None for flat in group)
            assert sum(flat.grad is not None for flat in flats) == len(group)
            nn.utils.clip_grads_with_norm_(group, 1.0, norm)
            optimizer.step()

        ours.update(step)
        assert all(p.grad is None for p in stack.parameters())
    state = [value for flat in flats for _, value in sorted(optimizer.state[flat].items()) if isinstance(value, Tensor)]
    return [*stack.parameters(), *flats], state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "sums"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_groups_change_no_bit(name: str, dtype: torch.dtype, sums: bool) -> None:
    assert OPTIMIZERS[name].per_tensor
    whole, state = trained(name, dtype, sums=sums, per_tensor=False, limit=2**28)
    for limit in (1, 9000):
        grouped, its_state = trained(name, dtype, sums=sums, per_tensor=True, limit=limit)
        assert all(torch.equal(a, b) for a, b in zip(whole, grouped, strict=True))
        assert len(state) == len(its_state) > 0
        assert all(torch.equal(a, b) for a, b in zip(state, its_state, strict=True))


def test_fp32_copies_of_one_group_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.ModuleList(nn.Linear(10, 10, bias=False, dtype=torch.bfloat16) for _ in range(6))
    ours = MasterWeights(layer.named_parameters(), per_tensor=True, limit=200)
    sum(one(torch.ones(1, 10, dtype=torch.bfloat16)).sum() for one in layer).backward()
    made, alive, most = torch.empty_like, [], [0]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        copy = made(*args, **kwargs)
        alive.append(weakref.ref(copy))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return copy

    monkeypatch.setattr(master_weights.torch, "empty_like", counted)
    ours.update(lambda group: None)
    assert len(alive) == 6
    assert most[0] == 2, "a group of two tensors"


def test_an_optimizer_that_wants_all_gradients_gets_them_at_once() -> None:
    layer = nn.ModuleList(nn.Linear(10, 10, bias=False, dtype=torch.bfloat16) for _ in range(6))
    ours = MasterWeights(layer.named_parameters(), limit=200)
    sum(one(torch.ones(1, 10, dtype=torch.bfloat16)).sum() for one in layer).backward()
    calls: list[int] = []
    ours.update(lambda group: calls.append(len(group)))
    assert calls == [6]


def test_state_is_made_a_group_at_a_time(monkeypatch: pytest.MonkeyPatch, tiny_config: Path) -> None:
    """Zero gradients of all tensors would be as much as the update no longer takes."""
    engine = adopted(tiny_config, micros=1)
    engine._owned = MasterWeights(engine.model.named_parameters(), per_tensor=True, limit=1)
    flats = [flat for _, flat in engine._owned]
    engine._optimizer = torch.optim.AdamW(flats, lr=0.1)
    seen: list[int] = []
    step: Callable[..., Any] = engine._optimizer.step
    monkeypatch.setattr(
        engine._optimizer, "step", lambda: (seen.append(sum(f.grad is not None for f in flats)), step())
    )
    before = [flat.detach().clone() for flat in flats]
    engine.create_state()
    assert seen == [1] * len(flats)
    assert all(torch.equal(a, b) for a, b in zip(before, flats, strict=True))
    assert len(engine._optimizer.state) == len(flats)
