"""An optimizer's whole life on one device: made, stepped, saved as intervals, restored into another, stepped on."""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from distft.core.types import Piece
from distft.engine import fragments
from distft.engine.fragments import Fragment
from distft.optim import MATRIX, OPTIMIZERS

HERE = [spec.name for spec in OPTIMIZERS.values() if spec.library is None or importlib.util.find_spec(spec.library)]
SHAPES = {"matrix": (400, 300), "small": (48, 64), "bias": (96,)}
"""One large enough to be paged (1e5 elements), one whose moments stay fp32 in 8-bit optimizers, one without rows."""


class Life:
    """Some tensors and the optimizer that updates them."""

    def __init__(self, name: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.flats = {
            key: torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for key, shape in SHAPES.items()
        }
        spec = OPTIMIZERS[name]
        matrices = [flat for flat in self.flats.values() if flat.ndim == 2 and spec.matrix_state_bytes is not None]
        rest = [flat for flat in self.flats.values() if all(flat is not matrix for matrix in matrices)]
        groups = [{"params": matrices, "weight_decay": 0.1, MATRIX: True}] if matrices else []
        groups.append({"params": rest, "weight_decay": 0.1})
        self.optimizer = spec.build(spec.params(learning_rate=1e-2), groups)
        self.device = device

    def create_state(self) -> None:
        """As engines do before the first update."""
        fragments.create_state(self.flats.values(), lambda: self.optimizer.step(), self.optimizer)

    def step(self, number: int) -> None:
        """One update by gradients that depend on the step's number alone."""
        generator = torch.Generator().manual_seed(number)
        for flat in self.flats.values():
            flat.grad = torch.randn(flat.shape, generator=generator).to(self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fragments(self) -> Iterator[Fragment]:
        """Each tensor whole."""
        for name, flat in self.flats.items():
            whole = {"numel": flat.numel(), "start": 0, "length": flat.numel(), "flat": flat, "offset": 0}
            yield Fragment(name=name, layout=f"whole/{name}", **whole)

    def saved(self) -> "Saved":
        """A copy on the host of all that a checkpoint holds."""
        return Saved(list(fragments.pieces(self.fragments(), self.optimizer)))

    def restore(self, saved: "Saved", step: int) -> None:
        """As engines do."""
        self.create_state()
        fragments.load(self.fragments(), self.optimizer, saved, optimizer_step=step)

    def values(self) -> dict[str, Tensor]:
        """The tensors, on the host."""
        return {name: flat.detach().cpu().clone() for name, flat in self.flats.items()}


class Saved:
    """A reader of intervals that were saved."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._tensors = {piece.name: piece.read().cpu().clone() for piece in pieces}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        return self._tensors[name][start:end]


def check(name: str, device: torch.device) -> None:
    """Assert that state made early, saved and restored, changes no bit of six updates."""
    plain, early = Life(name, device), Life(name, device)
    early.create_state()
    early.create_state()  # a rehearsal, then the first save's reservation
    assert all(torch.equal(plain.values()[key], early.values()[key]) for key in SHAPES), "no weight is changed by it"
    for number in range(3):
        plain.step(number)
        early.step(number)
    saved, other = early.saved(), Life(name, device)
    other.restore(saved, 3)
    for number in range(3, 6):
        for life in (plain, early, other):
            life.step(number)
    for key, expected in plain.values().items():
        assert torch.equal(early.values()[key], expected), (name, key, "state made before the first update")
        assert torch.equal(other.values()[key], expected), (name, key, "restored")
