"""Runs of `distft.train` that phases compare with each other."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.first_hour import inputs
from benchmarks.first_hour.phase import Context, Measured, StepFailed


def run(
    context: Context, name: str, *overrides: str, world: int = 1, codes: tuple[int, ...] = (0,), **more: Any
) -> Path:
    """The folder of a run of that name; one that is complete already is not run again.

    Raises:
        StepFailed: it ended with another code than `codes`.
    """
    folder = context.work / "runs" / name
    if 0 in codes and ended(folder).get("code") == 0:
        return folder
    recipe = inputs.train_recipe(context.work, toy=context.toy)
    command = [*context.python(world), "-m", "distft.train", str(recipe)]
    for override in (f'name="{name}"', *overrides):
        command += ["--set", override]
    code = context.run(command, f"{name}.log", launcher=world > 1, **more)
    if code not in codes:
        raise StepFailed(f"{name} ended with {code}: {ended(folder).get('reason') or context.last_line(f'{name}.log')}")
    return folder


def ended(folder: Path) -> dict[str, Any]:
    """Its exit.json; empty when there is none."""
    try:
        return json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def straight(context: Context) -> Path:
    """The reference of two phases: on the device, in the type of real runs, deterministic."""
    return run(context, "device", 'model.dtype="bfloat16"')


def on_the_host(context: Context) -> Path:
    """The same in fp32 on the CPU."""
    return run(context, "host", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 2) // 2)))


def columns(folder: Path) -> Measured:
    """Losses and gradient norms, by step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    return {name: [record[name] for record in steps] for name in ("loss", "grad_norm")}


def tensors(folder: Path) -> dict[str, Any]:
    """The final weights, in fp32."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(folder / "final/model.safetensors").items()}


def digest(folder: Path) -> str:
    """Of the final weights' file."""
    return hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()
