"""Moments of few bits: codes are the nearest values of torchao's maps, updates Adam's over what the codes stand for."""

import pytest
import torch
from torch import Tensor

from distft.optim import OPTIMIZERS
from distft.optim.block_states import EightBitFloats, FourBits

RATE, DECAY, SHAPE = 1e-2, 0.1, (60, 70)
"""4,200 elements: the last block of 128, and of 256, is short."""
FIRST = torch.tensor([-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0,
                      0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0])  # fmt: skip
SECOND = torch.arange(1, 17) / 16
"""What four bits stand for, in the first and the second moment."""
FLOATS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def nearest(values: Tensor, book: Tensor, block: int, top: float) -> Tensor:
    """Each value as the nearest of the book, in units of its block; nothing of the code under test is used."""
    flat = values.flatten().double()
    out = torch.empty_like(flat)
    for begin in range(0, len(flat), block):
        part = flat[begin : begin + block]
        unit = (part.abs().max().clip(1e-12) / top).float().double()
        gaps = (part[:, None] / unit - book.double()).abs()
        out[begin : begin + block] = book.double()[gaps.argmin(1)] * unit
    return out.view_as(values).float()


FORMATS = {
    "adamw_4bit": (FourBits(), [FIRST, SECOND], 1.0),
    "adamw_fp8": (EightBitFloats(), [FLOATS[FLOATS.isfinite()]] * 2, 448.0),
}


def made(name: str, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, torch.optim.Optimizer, list[Tensor]]:
    generator, spec = torch.Generator().manual_seed(0), OPTIMIZERS[name]
    param = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = spec.build(spec.params(learning_rate=RATE), [{"params": [param], "weight_decay": DECAY}])
    return param, optimizer, [torch.randn(shape, generator=generator) for _ in range(6)]


@pytest.mark.parametrize("name", FORMATS)
def test_updates_are_adams_over_what_codes_stand_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.optim import block_states

    monkeypatch.setattr(block_states, "CHUNK", 1024)  # more than one
    chosen, books, top = FORMATS[name]
    param, optimizer, gradients = made(name)
    wanted, moments = param.detach().clone(), [torch.zeros(SHAPE), torch.zeros(SHAPE)]
    for step, gradient in enumerate(gradients[:3], 1):
        param.grad = gradient.clone()
        optimizer.step()
        first, second = (0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2)
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        wanted = wanted * (1 - RATE * DECAY) - RATE * direction
        moments = [nearest(value, book, chosen.block, top) for value, book in zip((first, second), books, strict=True)]
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == chosen.code_dtype
        coded = [optimizer.coded.decoded(state, key, 0, param.numel()) for key in ("exp_avg", "exp_avg_sq")]
        for got, value in zip(coded, moments, strict=True):
            off = (got.view(SHAPE) - value).abs() > 1e-6 * value.abs().max()
            assert off.float().mean() < 1e-3, "the same codes, but for values in the middle of two"
        moments = [value.view(SHAPE).clone() for value in coded]
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=2e-6)
        wanted = param.detach().clone()


@pytest.mark.parametrize("name", FORMATS)
def test_states_are_as_large_as_planned(name: str) -> None:
    for shape in (SHAPE, (64, 64), (63, 65), (5000,)):
        param, optimizer, _ = made(name, shape)
        param.grad = torch.randn(shape)
        optimizer.step()
        kept = [value for key, value in optimizer.state[param].items() if key != "step"]
        held = sum(value.numel() * value.element_size() for value in kept)
        size = OPTIMIZERS[name].state_bytes
        assert size is not None
        assert held == size(shape).per_tensor, shape
    assert held < (1.1 if name == "adamw_4bit" else 2.2) * 5000


@pytest.mark.parametrize(("name", "theirs"), [("adamw_4bit", "AdamW4bit"), ("adamw_fp8", "AdamWFp8")])
def test_equals_torchao(name: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; it is not needed otherwise. Six updates, each code the same."""
    library = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    param, optimizer, gradients = made(name, (128, 96))
    other = torch.nn.Parameter(param.detach().clone())
    reference = getattr(library, theirs)([other], lr=RATE, weight_decay=DECAY)
    for gradient in gradients:
        param.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=5e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        codes, stored = optimizer.state[param][key], reference.state[other][key].codes
        assert torch.equal(codes.view(torch.uint8), stored.reshape(-1).view(torch.uint8))
