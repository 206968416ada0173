"""Adapters of another form: extracted from a model that was trained whole, of a smaller rank, with another scale."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from distft.merging import low_rank
from distft.merging.adapter_builder import AdapterBuilder, copy_beside, write_report
from distft.merging.adapter_config import CONFIG, WEIGHTS, adapter_mistake
from distft.merging.adapter_folder import AdapterFolder
from distft.merging.base_model import BaseModel, natural_key
from distft.merging.combining import CombinedTensor
from distft.merging.delta_sources import ModelDeltas
from distft.merging.folder_writer import refuse_existing, whole_folder


def extract(model: Path, base_folder: Path, out: Path, *, rank: int) -> list[CombinedTensor]:
    """Write the adapter of `rank` that is nearest to what a model learned from its base.

    Linear layers become products; what else has changed (norms, biases, embeddings, the head) is kept whole.

    Raises:
        RecipeError: other shapes than the base's, nothing changed, experts changed, or the rank is too large.
        FileSystemError: it cannot be written.
    """
    refuse_existing(out, model, base_folder)
    base = BaseModel(base_folder)
    source, builder = ModelDeltas(model, base), AdapterBuilder(base)
    head = next((name for name, module in base.lm.named_modules() if module is base.lm.get_output_embeddings()), "")
    tensors: list[CombinedTensor] = []
    for name in sorted(source.names, key=natural_key):
        delta = source.delta(name)
        if not bool(delta.any()):
            continue
        module = name.removesuffix(".weight")
        norm = float(delta.norm())
        if delta.ndim > 2:
            raise adapter_mistake(
                model, f"{name}: the change of experts cannot be extracted", "serve the model itself"
            )  # fmt: skip
        if delta.ndim < 2 or module == head or base.kinds.get(module) not in ("linear", "conv1d"):
            builder.add_whole(name, base.value(name) + delta)
            tensors.append(CombinedTensor(name=name, norm=norm, rank=0, lost=0.0))
            continue
        if rank > min(delta.shape):
            raise adapter_mistake("--rank", f"{rank} for {name} of {tuple(delta.shape)}", f"at most {min(delta.shape)}")
        cut = low_rank.truncate(delta, rank)
        builder.add_product(name, cut.left_MR, cut.right_RN)
        tensors.append(CombinedTensor(name=name, norm=cut.norm, rank=rank, lost=cut.lost))
    if not tensors:
        raise adapter_mistake(model, "no tensor differs from the base's", "check --base")
    with whole_folder(out) as aside:
        copy_beside_model(model, aside)
        builder.write(aside, base=str(base_folder), task_type="CAUSAL_LM")
        write_report(aside, "extract.json", _report(tensors, model=str(model), base=str(base_folder), rank=rank))
    return tensors


def copy_beside_model(model: Path, folder: Path) -> None:
    """Copy a model's tokenizer and chat template, and not its config, into an adapter's folder."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja", "generation_config.json"):  # fmt: skip
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def resize(folder: Path, out: Path, *, rank: int) -> list[CombinedTensor]:
    """Write the adapter of a smaller `rank` that is nearest to an adapter; whole tensors stay as they are.

    Raises:
        RecipeError: it is no plain LoRA, or its rank is not larger.
        FileSystemError: it cannot be written.
    """
    refuse_existing(out, folder)
    adapter = AdapterFolder(folder)
    adapter.refuse_unless_plain("adapters resize")
    modules = adapter.low_rank_modules()
    largest = max((adapter.config.rank_of(name) for name in modules), default=0)
    if rank >= largest:
        raise adapter_mistake(
            "--rank",
            f"{rank}, and the adapter has {largest}: a larger rank holds nothing more",
            f"at most {largest - 1}",
        )
    tensors: dict[str, Tensor] = {key: adapter.read(key) for key in adapter.whole.values()}
    found = []
    for name, keys in modules.items():
        product = adapter.low_rank(keys, transposed=False)
        b, a = product.b_OR.float() * product.scale, product.a_RI.float()
        cut = low_rank.truncate_product(b, a, rank)
        names = ("embedding_b", "embedding_a") if "embedding_a" in keys.keys else ("b", "a")
        for part, value in zip(names, (cut.left_MR, cut.right_RN), strict=True):
            tensors[keys.keys[part]] = value.contiguous()
        found.append(CombinedTensor(name=name, norm=cut.norm, rank=rank, lost=cut.lost))
    config = {**adapter.config.raw, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {},
              "alpha_pattern": {}}  # fmt: skip
    with whole_folder(out) as aside:
        copy_beside(folder, aside)
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_report(aside, "resize.json", _report(found, source=str(folder), rank=rank))
    return found


def convert(folder: Path, out: Path, *, scale: Literal["plain", "rslora"]) -> dict[str, float]:
    """Write the same adapter with its scale as alpha / r or alpha / sqrt(r); its tensors are copied byte by byte.

    Returns:
        Module -> alpha, of those that the config gives another alpha than its own.

    Raises:
        RecipeError: it is no LoRA, or has this scale already.
        FileSystemError: it cannot be written.
    """
    refuse_existing(out, folder)
    adapter = AdapterFolder(folder)
    config, rslora = adapter.config, scale == "rslora"
    if config.kind != "LORA":
        raise adapter_mistake(folder, f"peft_type {config.kind} has no scale", "convert takes LoRA")
    if config.rslora == rslora:
        raise adapter_mistake(folder, f"its scale is {scale} already", "nothing to convert")
    if config.target_parameters:
        raise adapter_mistake(
            folder, "has adapters of experts (target_parameters), whose names stand in its base", "merge it instead"
        )

    def alpha(module: str) -> float:
        rank, wanted = config.rank_of(module), config.scale_of(module)
        return _tidy(wanted * (math.sqrt(rank) if rslora else rank))

    own = _tidy((config.alpha / (config.rank if rslora else math.sqrt(config.rank))) * (
        math.sqrt(config.rank) if rslora else config.rank))  # fmt: skip
    others = {name: alpha(name) for name in adapter.low_rank_modules() if alpha(name) != own}
    raw: dict[str, Any] = {**config.raw, "use_rslora": rslora, "lora_alpha": own}
    raw["alpha_pattern"] = {re.escape(name): value for name, value in others.items()}
    with whole_folder(out) as aside:
        copy_beside(folder, aside)
        shutil.copyfile(adapter.file, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return others


def _tidy(alpha: float) -> float:
    """Return a whole number where rounding alone made it none: servers read alpha as an integer where they can."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _report(tensors: list[CombinedTensor], **facts: Any) -> dict[str, Any]:
    norm = math.sqrt(sum(tensor.norm**2 for tensor in tensors))
    lost = math.sqrt(sum(tensor.lost**2 for tensor in tensors))
    rows = [{**asdict(tensor), "relative_error": tensor.relative_error} for tensor in tensors]
    return {**facts, "relative_error": lost / norm if norm else 0.0, "tensors": rows, "torch": str(torch.__version__)}
