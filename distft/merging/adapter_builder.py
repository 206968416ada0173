"""A PEFT adapter folder written from products and whole tensors, plain: its scale is 1, every module has one rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from distft.merging.adapter_config import CONFIG, WEIGHTS
from distft.merging.adapter_folder import matches
from distft.merging.base_model import BaseModel
from distft.merging.low_rank import padded

REPORTS = ("combine.json", "merge.json", "extract.json", "resize.json")
"""What the operations here write of themselves."""
_BESIDE = (".json", ".jinja", ".model", ".txt")
_PREFIX = "base_model.model."


class AdapterBuilder:
    """Collects the tensors of an adapter and writes them with the config that belongs to them."""

    def __init__(self, base: BaseModel) -> None:
        """`base`: the model that the adapter is for."""
        self.base = base
        self._products: dict[str, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}

    def add_product(self, name: str, left_MR: Tensor, right_RN: Tensor) -> None:
        """Add the change left @ right of the tensor `name`, as the base stores it [M, N]."""
        self._products[name.removesuffix(".weight")] = (left_MR, right_RN)

    def add_whole(self, name: str, value: Tensor) -> None:
        """Add a tensor that stands in the place of the base's."""
        self._whole[name] = value

    def write(self, folder: Path, *, base: str | None, task_type: str | None) -> None:
        """Write config and tensors; `base` is what the config calls the base model.

        Raises:
            OSError: they cannot be written.
        """
        rank = max((left.shape[1] for left, _ in self._products.values()), default=1)
        modules, biases = self._saved()
        tensors = self._tensors(rank, modules)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        config = {
            "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base, "inference_mode": True,
            "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
            "target_modules": short_names(self.base, self._products), "modules_to_save": modules or None,
            "bias": biases, "fan_in_fan_out": any(self.base.kinds[name] == "conv1d" for name in self._products),
            "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _saved(self) -> tuple[list[str], str]:
        """Return modules_to_save, and the kind of biases that are saved beside products."""
        modules: list[str] = []
        biases = "none"
        for name in self._whole:
            module, _, short = name.rpartition(".")
            if short == "bias" and self.base.kinds.get(module) in ("linear", "conv1d") and (
                module in self._products or f"{module}.weight" not in self._whole
            ):  # fmt: skip
                biases = biases if module in self._products and biases != "all" else "all"
                biases = "lora_only" if biases == "none" else biases
            elif module not in modules:
                modules.append(module)
        return modules, biases

    def _tensors(self, rank: int, modules: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, product in self._products.items():
            left, right = padded(*product, rank)
            kind = self.base.kinds[module]
            a, b = (right, left) if kind == "linear" else (left.T, right.T)
            names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else (
                "lora_A.weight", "lora_B.weight"
            )  # fmt: skip
            tensors |= {
                f"{_PREFIX}{module}.{name}": part.contiguous() for name, part in zip(names, (a, b), strict=True)
            }
        for module in modules:  # whole modules, also what of them is the base's own
            for short in self.base.lm.get_submodule(module)._parameters:
                name = f"{module}.{short}"
                if self.base.shape(name) is not None and name not in self._whole:
                    tensors[_PREFIX + name] = self.base.value(name)
        for name, value in self._whole.items():
            module, _, short = name.rpartition(".")
            wrapped = module in self._products and module not in modules
            tensors[_PREFIX + (f"{module}.base_layer.{short}" if wrapped else name)] = value.contiguous()
        return tensors


def short_names(base: BaseModel, modules: Iterable[str]) -> list[str]:
    """Return names for target_modules that mean these modules of the base and no others."""
    wanted = set(modules)
    short = sorted({name.rpartition(".")[2] for name in wanted})
    meant = {name for name, kind in base.kinds.items() if kind != "other" and matches(name, tuple(short))}
    return short if meant == wanted else sorted(wanted)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what stands beside an adapter's tensors: tokenizer, chat template, generation config."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in _BESIDE and path.name not in (CONFIG, *REPORTS):
            shutil.copyfile(path, folder / path.name)


def write_report(folder: Path, name: str, report: Mapping[str, Any]) -> None:
    """Write what was done beside the result."""
    (folder / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
