"""The run folder's `final/`: a plain Hugging Face model or PEFT adapter folder, written one tensor at a time."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distft.core.errors import DistftError
from distft.core.types import Engine
from distft.export.spec import Shapes
from distft.model.layout import FileLayout
from distft.model.weights import digest

MAX_FILE_BYTES = 4 * 2**30
"""Weights are split into files of at most this size, so no more than one file's worth is ever held."""


def write_model(
    folder: Path,
    engine: Engine,
    shapes: Shapes,
    *,
    prefix: str,
    layout: FileLayout,
    save_rest: Callable[[Path], None],
) -> None:
    """Write every tensor of the model, gathered to rank 0 a file at a time, in the hub's layout.

    `prefix` is what engines put before the names; `save_rest` writes config and tokenizer (rank 0 only).
    """
    plan = _split(shapes, layout)
    aside = folder.with_name(f".tmp-{folder.name}")
    _start(engine, aside)
    total, where = 0, {}
    for index, groups in enumerate(plan):
        gathered = _gather(engine, [name for group in groups for name in group], prefix)
        if engine.rank == 0:
            tensors: dict[str, Tensor] = {}
            for group in groups:
                for name in group:
                    _require(name, gathered[name], shapes[name][0])
                tensors |= layout.stored({name: gathered.pop(name) for name in group})
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            path = aside / _file_name(index, len(plan))
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors makes it private; other people's servers read it
            where |= dict.fromkeys(tensors, path.name)
    if engine.rank == 0:
        if len(plan) > 1:
            index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
            (aside / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
        save_rest(aside)
    _finish(engine, aside, folder)


def write_adapter(
    folder: Path,
    engine: Engine,
    shapes: Shapes,
    *,
    prefix: str,
    starts_at_zero: Callable[[str], bool],
    starts: Mapping[str, str] | None = None,
    save_adapter: Callable[[Path, dict[str, Tensor]], None],
    save_rest: Callable[[Path], None],
    is_trained: bool = True,
) -> None:
    """Write the trained tensors only, in the adapter library's own format.

    `is_trained`: it is an error that nothing has changed.

    Raises:
        DistftError: a tensor came back empty or in another shape, or every one is still what training started from.
    """
    aside = folder.with_name(f".tmp-{folder.name}")
    _start(engine, aside)
    tensors = _gather(engine, list(shapes), prefix)
    if engine.rank == 0:
        for name, tensor in tensors.items():
            _require(name, tensor, shapes[name][0])
        zeros = [tensor for name, tensor in tensors.items() if starts_at_zero(name)]
        noted = {name: tensor for name, tensor in tensors.items() if name in (starts or {})}
        same = noted and all(digest(tensor) == (starts or {})[name] for name, tensor in noted.items())
        if is_trained and (same or (zeros and not any(tensor.any() for tensor in zeros))):
            raise DistftError("the adapter is still its initial value: nothing was trained, so nothing is saved")
        save_adapter(aside, tensors)
        save_rest(aside)
    _finish(engine, aside, folder)


def _split(shapes: Shapes, layout: FileLayout) -> list[list[tuple[str, ...]]]:
    """Return the groups of parameters that go into each file; a group is saved together."""
    files: list[list[tuple[str, ...]]] = [[]]
    held = 0
    for group in layout.groups(shapes):
        size = sum(torch.Size(shapes[name][0]).numel() * shapes[name][1].itemsize for name in group)
        if held and held + size > MAX_FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(group)
        held += size
    return files


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _gather(engine: Engine, names: list[str], prefix: str) -> dict[str, Tensor]:
    pairs: Iterator[tuple[str, Tensor]] = engine.full_tensors(prefix + name for name in names)
    gathered = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in pairs}
    return gathered if engine.rank == 0 else {}


def _require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise DistftError(f"{name} was gathered as {tuple(tensor.shape)} instead of {shape}; nothing is saved")


def _start(engine: Engine, aside: Path) -> None:
    if engine.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    engine.barrier()


def _finish(engine: Engine, aside: Path, folder: Path) -> None:
    """Rename the folder, so that it appears whole or not at all."""
    if engine.rank == 0:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    engine.barrier()


def save_config(lm: Any, folder: Path, *, finish: Callable[[Any], None] = lambda config: None) -> None:
    """Write config.json, as for inference: with a cache, and free of how we trained; `finish` changes it last."""
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    config.use_cache = True
    config._attn_implementation_internal = None
    finish(config)
    config.save_pretrained(folder)


def save_generation_config(lm: Any, folder: Path, stop_ids: Sequence[int]) -> None:
    """Write a generation_config.json that stops at what trained rows end with, besides what the base stops at."""
    config = copy.deepcopy(getattr(lm, "generation_config", None))
    if config is None:
        return
    base = config.eos_token_id
    base_ids = [] if base is None else list(base) if isinstance(base, list | tuple) else [base]
    stops = [*base_ids, *(token for token in stop_ids if token not in base_ids)]
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    config.save_pretrained(folder)
