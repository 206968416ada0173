"""An adapter that was trained before, read from PEFT's folder instead of starting as identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.model.adapters.lora import ADAPTER
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS = "adapter_model.safetensors"


def from_folder(method: MethodSpec, folder: Path) -> MethodSpec:
    """Return `method` with its own parameters filled from `folder`.

    Raises:
        RecipeError: the folder has no safetensors weights; later, when it is filled: they do not fit the recipe.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise RecipeError(str(folder), [Problem(message=f"no {WEIGHTS}", fix="an adapter in PEFT's form")])

    def owns(name: str) -> bool:
        return method.owns(name) or f".modules_to_save.{ADAPTER}." in name

    def stored(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
        from safetensors import safe_open

        key = file_key(name)
        with safe_open(file, framework="pt") as weights:
            tensor: Any = weights.get_tensor(key) if key in weights.keys() else None  # noqa: SIM118
        if tensor is None or tensor.shape != meta.shape:
            problem = (
                "lacks it" if tensor is None else f"has it as {tuple(tensor.shape)} instead of {tuple(meta.shape)}"
            )
            raise RecipeError(
                str(file), [Problem(message=f"{key}: the file {problem}", fix="use the adapter's own recipe")]
            )
        return tensor

    return replace(method, owns=owns, fresh=stored)


def file_key(name: str) -> str:
    """Return a parameter's name in PEFT's file, which leaves the adapter's name out."""
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
