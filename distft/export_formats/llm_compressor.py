"""The door to llm-compressor: rounds the linear layers of a model folder, and saves it as compressed-tensors has it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distft.core.errors import MachineError
from distft.core.optional import why_not

PACKAGE, FORMAT = "llmcompressor", "compressed_tensors"
INSTALL = (
    "pip install 'distft[quantize]' in an environment of its own (it takes transformers 5.17), or beside a newer one: "
    "pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.20.1 loguru"
)
HEAD = "lm_head"
"""Stays as it is: it is often the embedding as well, and costs most where it is rounded."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How linear layers are stored."""

    method: Literal["nearest", "gptq", "awq"]
    bits: int
    type: Literal["int", "float"] = "int"
    group_size: int | None = None
    """Numbers of a row that share a scale; None: the whole row."""
    symmetric: bool = True
    """Zero is stored as zero; false: each group has a zero point."""
    rounds_activations: bool = False
    """What goes into a layer is rounded in the same way, with a scale for each token, while the model runs."""


def missing() -> str:
    """Return why nothing can be rounded here; "" where it can."""
    reason = why_not(PACKAGE) or why_not(FORMAT)
    return f"{reason}  {INSTALL}" if reason else ""


def version() -> str:
    """Return the library and its version."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def round_model(model: Path, out: Path, how: Rounding, rows: Sequence[Sequence[int]]) -> None:
    """Write the rounded model of a folder; the tokenizer is not written.

    Args:
        model: folder of a whole model.
        out: folder to write; it exists.
        how: the form that layers get.
        rows: token ids to calibrate on; empty for rounding to the nearest.

    Raises:
        MachineError: the library is not there, or gave up.
    """
    import torch
    import transformers

    if reason := missing():
        raise MachineError(reason)
    loader: Any = transformers.AutoModelForCausalLM
    lm = loader.from_pretrained(model, dtype="auto", local_files_only=True).eval()
    rounder: Any = importlib.import_module(PACKAGE)
    given: dict[str, Any] = {"shuffle_calibration_samples": False}
    if rows:
        given |= {"dataset": _dataset(rows), "num_calibration_samples": len(rows)}
        given["max_seq_length"] = max(map(len, rows))
    torch.manual_seed(0)
    try:
        with _quiet(), _unpinned():
            rounder.oneshot(model=lm, recipe=_recipe(how), **given)
            lm.save_pretrained(out, save_compressed=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise MachineError(f"{version()} could not round {model.name}: {type(error).__name__}: {first}") from error


def _dataset(rows: Sequence[Sequence[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": [list(ids) for ids in rows], "attention_mask": [[1] * len(ids) for ids in rows]}
    )


def _recipe(how: Rounding) -> list[Any]:
    quantization: Any = importlib.import_module(f"{PACKAGE}.modifiers.quantization")
    formats: Any = importlib.import_module(f"{FORMAT}.quantization")
    weights = formats.QuantizationArgs(
        num_bits=how.bits,
        type=how.type,
        symmetric=how.symmetric,
        strategy="channel" if how.group_size is None else "group",
        group_size=how.group_size,
    )
    activations = None
    if how.rounds_activations:
        activations = formats.QuantizationArgs(
            num_bits=how.bits, type=how.type, symmetric=True, strategy="token", dynamic=True
        )
    scheme = formats.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    about = {"config_groups": {"group_0": scheme}, "ignore": [HEAD]}
    if how.method == "gptq":
        return [quantization.GPTQModifier(**about)]
    if how.method == "awq":
        awq: Any = importlib.import_module(f"{PACKAGE}.modifiers.transform.awq")
        return [awq.AWQModifier(), quantization.QuantizationModifier(**about)]
    return [quantization.QuantizationModifier(**about)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger: Any = importlib.import_module("loguru").logger
    for name in (PACKAGE, FORMAT):
        logger.disable(name)
    try:
        yield
    finally:
        for name in (PACKAGE, FORMAT):
            logger.enable(name)


@contextlib.contextmanager
def _unpinned() -> Iterator[None]:
    """Let AWQ run without a GPU.

    llm-compressor 0.14.0.1 pins what it keeps between layers, which torch refuses on a machine without an accelerator
    ("Cannot access accelerator device when none is available"). Delete this once AWQ's slow test passes without it.
    """
    import torch

    cache: Any = importlib.import_module(f"{PACKAGE}.pipelines.cache").IntermediatesCache
    if torch.cuda.is_available() or not hasattr(cache, "pin_memory"):
        yield
        return
    pin = cache.pin_memory
    cache.pin_memory = lambda *given, **named: None
    try:
        yield
    finally:
        cache.pin_memory = pin
