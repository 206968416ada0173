"""bitsandbytes' optimizers wait for the GPU at most once a step, and compute what the library computes."""

import importlib
import warnings
from typing import Any

import pytest
import torch

from distft.optim import OPTIMIZERS, bitsandbytes_step

OF_THE_LIBRARY = [spec.name for spec in OPTIMIZERS.values() if spec.library == "bitsandbytes"]
SHAPES = [(400, 300), (48, 64), (96,), (64, 128)]
"""One large enough to be paged on a GPU, one whose moments stay fp32 in 8-bit optimizers, one without rows."""


class Waits:
    """Counts calls of the library's synchronise function, ours and its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in ("bitsandbytes.utils", "bitsandbytes.optim.optimizer"):
            monkeypatch.setattr(importlib.import_module(module), "sync_gpu", self._see)

    def _see(self, tensor: torch.Tensor) -> None:
        self.count += 1


def made(name: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    spec: Any = OPTIMIZERS[name]
    return params, spec.build(spec.params(learning_rate=1e-2), groups)


def give_gradients(params: list[torch.nn.Parameter], number: int) -> None:
    """Gradients by the step's number; every second step one tensor has none."""
    generator = torch.Generator().manual_seed(number)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator)
        param.grad = None if number % 2 and index == 1 else gradient


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_it_waits_at_most_once_where_the_library_waits_after_every_tensor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, optimizer = made(name)
    theirs, reference = made(name)
    library: Any = type(reference).__mro__[1]
    assert library.__module__.startswith("bitsandbytes."), "what ours is derived from"
    assert library.step is not type(reference).step
    waits = Waits(monkeypatch)
    with warnings.catch_warnings(action="ignore"):  # nothing is paged on a CPU
        for number in range(4):
            for params in (ours, theirs):
                give_gradients(params, number)
            waits.count = 0
            library.step(reference)
            with_gradient = sum(param.grad is not None for param in theirs)
            assert waits.count == with_gradient + name.startswith("paged"), "else this file can go"
            waits.count = 0
            optimizer.step()
            assert waits.count == name.startswith("paged")
    for param, other in zip(ours, theirs, strict=True):
        assert torch.equal(param, other)
        state, expected = optimizer.state[param], reference.state[other]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key


def test_on_another_stream_it_waits_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's kernels go to stream 0 whatever torch's current stream is."""
    params, optimizer = made("adamw_8bit")
    waits = Waits(monkeypatch)
    order: list[str] = []
    kind: Any = type(optimizer)
    update = kind.update_step
    monkeypatch.setattr(bitsandbytes_step, "_on_a_stream_of_its_own", lambda tensor: True)
    monkeypatch.setattr(
        kind,
        "update_step",
        lambda self, *args: order.append(f"update after {waits.count}") or update(self, *args),
        raising=False,
    )
    give_gradients(params, 0)
    optimizer.step()
    assert order == ["update after 1"] * len(SHAPES)
    assert waits.count == 2


def test_without_a_gradient_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = made("paged_adamw_8bit")
    waits = Waits(monkeypatch)
    optimizer.step()
    assert waits.count == 0
    assert not optimizer.state


def test_a_stream_is_asked_for_on_gpus_only() -> None:
    assert not bitsandbytes_step._on_a_stream_of_its_own(torch.zeros(1))
