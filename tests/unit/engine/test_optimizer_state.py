"""Optimizer state that is made before the first update, saved and restored; paged state as it lies on a GPU."""

import pytest
import torch
from optimizer_kit import HERE, SHAPES, Life, Saved, check

from distft.engine import fragments
from distft.optim import OPTIMIZERS


@pytest.mark.parametrize("name", HERE)
def test_made_early_saved_and_restored_it_changes_no_bit(name: str) -> None:
    check(name, torch.device("cpu"))


def test_every_optimizer_is_tried() -> None:
    assert set(HERE) == set(OPTIMIZERS), "bitsandbytes is installed where tests run"


def test_paged_codes_are_read_where_their_constants_are() -> None:
    """Managed memory is a CPU tensor to torch, and bitsandbytes' kernels run on the GPU: here a meta device."""
    life = Life("paged_adamw_8bit", torch.device("cpu"))
    life.create_state()
    for state in life.optimizer.state.values():
        for key in state.keys() & {"absmax1", "absmax2", "qmap1", "qmap2"}:
            state[key] = state[key].to("meta")
    pieces = {piece.name: piece for piece in fragments.pieces(life.fragments(), life.optimizer)}
    for moment in ("exp_avg/matrix", "exp_avg_sq/matrix"):
        assert pieces[moment].data.device.type == "meta"
        assert pieces[moment].read(300, 1300).device.type == "meta"
        assert len(pieces[moment].read(300, 1300)) == 1000
    assert pieces["exp_avg/small"].data.device.type == "cpu", "fp32, where it lies"


def test_managed_memory_is_taken_once_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes never frees it: a rehearsal, a reservation and a restore must not take it again."""
    taken: list[tuple[int, ...]] = []
    life = Life("paged_adamw_8bit", torch.device("cpu"))
    get = type(life.optimizer).get_state_buffer
    monkeypatch.setattr(
        type(life.optimizer),
        "get_state_buffer",
        lambda self, p, dtype=torch.float32: taken.append(tuple(p.shape)) or get(self, p, dtype),
    )
    life.create_state()
    life.create_state()
    life.step(0)
    saved: Saved = life.saved()
    life.restore(saved, 1)
    life.step(1)
    assert sorted(taken) == sorted([shape for shape in SHAPES.values() for _ in range(2)]), "two moments of each tensor"


def test_all_that_a_save_copies_is_reserved_before_the_first_step() -> None:
    life = Life("adamw", torch.device("cpu"))
    life.create_state()
    before = sum(piece.data.numel() for piece in fragments.pieces(life.fragments(), life.optimizer))
    life.step(0)
    assert before == sum(piece.data.numel() for piece in fragments.pieces(life.fragments(), life.optimizer))
