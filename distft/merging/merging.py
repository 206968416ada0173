"""An adapter merged into its base: streamed tensor by tensor, compared with what it was made of, whole or not there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.merging import comparison
from distft.merging.adapter_config import AdapterConfig, adapter_mistake
from distft.merging.adapter_folder import AdapterFolder
from distft.merging.base_model import BaseModel, TrainedIn4bit, base_hashes
from distft.merging.bound_adapter import BoundAdapter
from distft.merging.changes import Change, ExpertsChange, LowRankChange
from distft.merging.comparison import MergeComparison
from distft.merging.folder_writer import refuse_existing, whole_folder
from distft.merging.model_writer import ModelWriter, PackedError
from distft.model.heads import HEADS

REPORT = "merge.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HEADS = {None: "lm", "CAUSAL_LM": "lm", "SEQ_CLS": "scalar"}
"""PEFT's task type -> head."""


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """An adapter and the base it was trained on."""

    adapter: Path
    base: Path
    tokenizer: Path | None = None
    """Folder of another tokenizer than the base's; None: the adapter's folder or the base's."""
    in_4bit: TrainedIn4bit | None = None


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged and how far the result is from its parts; merge.json."""

    source: str
    base: str
    named_base: str | None
    """What the adapter's own config calls its base."""
    base_sha256: dict[str, str]
    """Files of the base's weights, and its config."""
    adapter_sha256: str
    files_sha256: dict[str, str]
    """Files of weights that were written; the same inputs and library versions give the same ones."""
    formulas: dict[str, int]
    """Formula -> tensors it was applied to."""
    base_in_4bit: int
    """Tensors of the base whose values went through 4 bits, as in training."""
    untied: bool
    """The base ties its head to the embedding, and the adapter changed one of the two."""
    dtype: str
    quantized: list[PackedError]
    max_kl: float
    comparison: MergeComparison | None

    def to_json(self) -> dict[str, Any]:
        """Return the report with the versions of the libraries."""
        raw = asdict(self)
        raw["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        return raw


def open_base(source: MergeSource, config: AdapterConfig) -> BaseModel:
    """Return the base with the head that the adapter's task asks for.

    Raises:
        RecipeError: the task is none that is known here, or the base cannot be read.
    """
    task = config.task_type
    if task not in _HEADS:
        allowed = ", ".join(name for name in _HEADS if name)
        raise adapter_mistake(config.folder, f"task_type {task} is not understood here", f"understood are {allowed}")
    brought = [set(ids) for ids in config.token_indices.values()]
    new = set.intersection(*brought) if brought else ()
    return BaseModel(source.base, head=HEADS[_HEADS[task]], in_4bit=source.in_4bit, new_tokens=new)


def merge(
    source: MergeSource,
    out: Path,
    *,
    rows: Sequence[Sequence[int]] | None,
    dtype: torch.dtype | None = None,
    max_kl: float | None = None,
    quantize: bool = False,
    max_file_bytes: int | None = None,
) -> MergeReport:
    """Write the merged model to `out`.

    Args:
        source: the adapter and its base.
        out: the folder that appears; it must not exist.
        rows: token ids of held-out rows that both are compared on; None: not compared, which the report says.
        dtype: of the merged weights; None: the base's.
        max_kl: largest mean divergence; None: by the type.
        quantize: store the merged matrices in 4 bits again.
        max_file_bytes: size of the files of weights, for tests.

    Raises:
        RecipeError: adapter and base do not fit together.
        NumericError: the merged model is another one than the adapter's.
        FileSystemError: it cannot be written.
    """
    refuse_existing(out, source.adapter, source.base)
    adapter = AdapterFolder(source.adapter)
    base = open_base(source, adapter.config)
    if quantize and source.in_4bit is None:
        raise adapter_mistake("--quantize", "the adapter was not trained beside a 4-bit base", "leave --quantize out")
    bound = BoundAdapter(adapter, base)
    dtype = dtype or base.dtype
    _refuse_unset_head(base, bound)
    tied = _stays_tied(base, bound)
    more = {} if max_file_bytes is None else {"max_file_bytes": max_file_bytes}
    writer = ModelWriter(base, dtype, tied=tied, **more)
    limit = _limit(dtype, max_kl, quantize=quantize)
    counted = _Counted(base, bound)
    with whole_folder(out, writer.num_bytes) as aside:
        beside = [place for place in (source.adapter, source.tokenizer, source.base) if place is not None]
        packed, hashes = list[PackedError](), dict[str, str]()
        if quantize:
            assert source.in_4bit is not None
            packed = writer.write_packed(aside, counted.value, base.names_in_4bit, source.in_4bit.params)
            hashes["model.safetensors"] = hashlib.sha256((aside / "model.safetensors").read_bytes()).hexdigest()
            writer.write_rest(aside, *beside, quantization=_bitsandbytes(source.in_4bit, dtype))
        else:
            hashes = writer.write(aside, counted.value)
            writer.write_rest(aside, *beside)
        found = None if rows is None else comparison.compare(base, source.adapter, aside, rows, dtype)
        if found is not None:
            found.require(limit, _what_rounds_less(dtype, quantize=quantize))
        report = MergeReport(
            source=str(source.adapter),
            base=str(source.base),
            named_base=adapter.config.base,
            base_sha256=base_hashes(source.base),
            adapter_sha256=adapter.digest(),
            files_sha256=hashes,
            formulas=counted.formulas,
            base_in_4bit=base.num_in_4bit,
            untied=not tied and bool(base.tied),
            dtype=str(dtype).removeprefix("torch."),
            quantized=packed,
            max_kl=limit,
            comparison=found,
        )
        (aside / REPORT).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return report


class _Counted:
    """Gives merged values, and counts which formula made how many."""

    def __init__(self, base: BaseModel, bound: BoundAdapter) -> None:
        self.base, self.bound = base, bound
        self.formulas: dict[str, int] = {}

    def value(self, name: str) -> Tensor:
        """Return a merged tensor in fp32."""
        changes = self.bound.changes(name)
        if changes:
            key = " then ".join(formula(change) for change in changes)
            self.formulas[key] = self.formulas.get(key, 0) + 1
        return self.bound.applied(name, self.base.value(name))


def formula(change: Change) -> str:
    """Return the formula of a change, as the report has it."""
    if isinstance(change, LowRankChange):
        moved = f"W + {change.scale:.6g} B A"
        return moved if change.magnitude_O is None else f"m ({moved}) / |{moved}|"
    if isinstance(change, ExpertsChange):
        return f"W[e] + {change.scale:.6g} B[e] A[e]"
    names = {"WholeChange": "the adapter's own tensor", "BiasShift": "bias + scale * bias of B",
             "TokenRows": "rows of tokens replaced", "ScaleChange": "W * factors"}  # fmt: skip
    return names[type(change).__name__]


def _what_rounds_less(dtype: torch.dtype, *, quantize: bool) -> str:
    if quantize:
        return "leave --quantize out"
    return "--dtype float32 rounds less" if dtype != torch.float32 else "check --base: fp32 rounds nothing away"


def _limit(dtype: torch.dtype, max_kl: float | None, *, quantize: bool) -> float:
    if max_kl is not None:
        return max_kl
    return QUANTIZED_MAX_KL if quantize else comparison.MAX_KL[dtype]


QUANTIZED_MAX_KL = 0.05
"""Four bits round by several percent: the bound catches a wrong merge, not the rounding."""


def _refuse_unset_head(base: BaseModel, bound: BoundAdapter) -> None:
    """Refuse a head that neither the base's files nor the adapter holds: it would be random.

    Raises:
        RecipeError: names it.
    """
    missing = sorted(base.unset - bound.names)
    if missing:
        raise adapter_mistake(
            bound.adapter.folder, f"holds no {missing[0]}, and neither does the base", "train with the head saved"
        )


def _stays_tied(base: BaseModel, bound: BoundAdapter) -> bool:
    """Return whether tied tensors are still equal with the adapter in them."""
    for target, origin in base.tied.items():
        if not {target, origin} & bound.names:
            continue
        ours, theirs = (bound.applied(name, base.value(name)) for name in (target, origin))
        equal = torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7) if bound.adapter.config.tied else torch.equal(ours, theirs)  # fmt: skip  # noqa: E501
        if not equal:
            return False
    return True


def _bitsandbytes(in_4bit: TrainedIn4bit, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json's quantization_config, as transformers reads it."""
    params = in_4bit.params
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": params.type,
        "bnb_4bit_use_double_quant": params.double, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
