"""Which method, once the GPUs are known: each in order of preference, planned as `distft plan` plans it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.plan.case import PlanCase
    from distft.plan.setup import Machine


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A method that was planned."""

    method: str
    fits: bool
    peak_gib: float
    gpu: str
    gpu_gib: float
    changes: tuple[str, ...]
    """What would make it fit, when it does not."""

    def __str__(self) -> str:
        word = "fits" if self.fits else "does not fit"
        return f"{self.method} {word}: {self.peak_gib:.1f} of {self.gpu_gib:.1f} GiB on {self.gpu} (planned)"


def first_that_fits(methods: Sequence[str], text_of: Callable[[str], str], folder: Path, machine: Machine) -> list[Fit]:
    """Plan methods in order until one fits; the last of the list is the one to take.

    Args:
        methods: in order of preference.
        text_of: method -> recipe text.
        folder: holds the model's config.json.
        machine: as `distft.plan.machine.read_machine` gives it.

    Raises:
        RecipeError: transformers does not know the config, or the batch does not split over the machine.
        MachineError: an engine cannot do what the method needs.
    """
    from distft.plan.planner import Planner

    tried: list[Fit] = []
    with tempfile.TemporaryDirectory() as place:
        for method in methods:
            path = Path(place) / f"{method}.toml"
            path.write_text(text_of(method), encoding="utf-8")
            planner = Planner(path=str(path), overrides=(), folder=folder, machine=machine)
            case = planner.case()
            last = method == methods[-1]
            changes = [str(change) for change in planner.changes(case)] if last and not case.fits else []
            tried.append(_fit(method, case, changes))
            if case.fits:
                break
    return tried


def parameters_of(model_path: str, folder: Path) -> int:
    """Return the parameters of the model whose config.json `folder` holds."""
    from distft.catalog import REGISTRIES
    from distft.plan import inventory
    from distft.recipe import ModelTable

    full: Any = REGISTRIES.method["full"]
    return inventory.read(ModelTable(path=model_path), folder, full, full.params()).total


def _fit(method: str, case: PlanCase, changes: list[str]) -> Fit:
    return Fit(
        method=method,
        fits=case.fits,
        peak_gib=case.memory.peak / 2**30,
        gpu=case.setup.machine.gpu.name,
        gpu_gib=case.setup.machine.gpu.memory_gib,
        changes=tuple(changes),
    )
