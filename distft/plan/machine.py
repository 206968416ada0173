"""What `--gpu`, `--gpus` and `--nodes` mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distft.core import accelerators
from distft.core.accelerators import BY_NAME, Accelerator
from distft.core.errors import Problem, RecipeError
from distft.plan.calibration import of_gpu
from distft.plan.setup import Machine
from distft.recipe.explain import did_you_mean

DEFAULT_GPU = "h100-80gb"
_GIB = re.compile(r"(\d+(?:\.\d+)?)(?:gib)?", re.IGNORECASE)


def read_machine(gpu: str | None, gpus: int, nodes: int, calibration: Path | None = None) -> Machine:
    """Return a machine of `gpus` in each of `nodes`, rates from `calibration`, by default where these are kept.

    Raises:
        RecipeError: an unknown GPU, or numbers that are none.
    """
    problems = []
    if gpus < 1:
        problems.append(Problem(message=f"--gpus {gpus}  must be at least 1"))
    if nodes < 1:
        problems.append(Problem(message=f"--nodes {nodes}  must be at least 1"))
    accelerator = _read_gpu(gpu or DEFAULT_GPU, problems)
    if problems or accelerator is None:
        raise RecipeError("distft plan", problems)
    return Machine(gpu=accelerator, gpus_per_node=gpus, nodes=nodes, rates=of_gpu(accelerator, calibration))


def _read_gpu(text: str, problems: list[Problem]) -> Accelerator | None:
    if match := _GIB.fullmatch(text.strip()):
        gib = float(match[1])
        if gib > 0:
            return of_size(gib)
        problems.append(Problem(message=f"--gpu {text}  must be more than 0 GiB"))
        return None
    try:
        return accelerators.named(text)
    except KeyError as error:
        near = error.args[0]
        hint = f', did you mean "{near}"?' if near else ""
        problems.append(
            Problem(
                message=f"--gpu {text}  unknown GPU{hint}",
                fix=f"GiB as a number, or one of {', '.join(sorted(BY_NAME))}",
            )
        )
        return None


def of_size(gib: float) -> Accelerator:
    """Return a GPU of exactly this much usable memory; speeds are those of the catalogue's nearest in size."""
    near = min(accelerators.ACCELERATORS, key=lambda gpu: (abs(gpu.memory_gib - gib), -gpu.bf16_flops))
    return replace(near, name=f"{gib:g}gib", product=f"{gib:g} GiB, rates of {near.name}", memory_gib=gib)


def check_names(flag: str, names: Sequence[str], allowed: list[str]) -> None:
    """Check that names given to a flag are registered.

    Raises:
        RecipeError: those that are not, each with the nearest.
    """
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise RecipeError(
            "distft plan",
            [
                Problem(
                    message=f"{flag} {name}  unknown{did_you_mean(name, allowed)}", fix=f"allowed: {', '.join(allowed)}"
                )
                for name in unknown
            ],
        )
