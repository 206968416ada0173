"""Weights that a folder stores quantised, read as the values they mean.

A storage scheme turns the tensors in the files into those that a model without quantisation would have: it tells
which it takes together (a weight and its scales) and computes their product, one weight at a time. What config.json
names in `quantization_config` decides; what is not listed here is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.model import quantize
from distft.model.tensor_files import Entry, TensorFiles, mistake

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types whose values are the weights themselves."""
Dequantize = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]
"""(the parts, by the suffix after the weight's name; type wanted) -> the weight."""
_FIX = "fetch the repository with 16-bit weights, or dequantise it first (transformers: model.dequantize(), then save)"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One weight: the tensors it is stored in, by suffix, and what turns them into values."""

    parts: Mapping[str, str]
    dequantize: Dequantize


class StoredWeights:
    """The tensors of a folder by the names and with the values of a model that is not quantised."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """`dtype`: of what is dequantised.

        Raises:
            RecipeError: the files cannot be read, or are stored in a way that is not understood.
        """
        self.files = TensorFiles(folder)
        self._dtype = dtype
        config = quantization_of(folder)
        self._stored = {} if config is None else _scheme(folder, config, self.files)
        taken = {part for stored in self._stored.values() for part in stored.parts.values()}
        dropped = {name for name in self.files.names if config is not None and name.endswith(_ACTIVATION_SCALES)}
        self.names = frozenset((self.files.names - taken - dropped) | self._stored.keys())
        for name in sorted(self.names - self._stored.keys()):
            entry = self.files.entries[name]
            if entry.dtype not in FLOATS and not entry.dtype.startswith(("I", "U", "BOOL")):
                raise mistake(
                    f"{entry.file}: {name} is stored as {entry.dtype}, without the scales that belong to it",
                    _FIX if config is not None else "add the quantization_config that the files belong to",
                )

    def entry(self, name: str) -> Entry | None:
        """Return what the header says of a tensor that is stored as it is; None for one that is dequantised."""
        return None if name in self._stored else self.files.entries[name]

    def file(self, name: str) -> Path:
        """Return where the tensor, or its first part, is."""
        stored = self._stored.get(name)
        return self.files.entries[next(iter(stored.parts.values())) if stored else name].file

    def read(self, name: str) -> Tensor:
        """Return the value; of a tensor that is stored as it is a view of the mapped file."""
        stored = self._stored.get(name)
        if stored is None:
            return self.files.read(name)
        return stored.dequantize({suffix: self.files.read(part) for suffix, part in stored.parts.items()}, self._dtype)


_ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".input_scale_inv")
"""Scales of inputs that are quantised while computing; dequantised weights compute in 16 bits or more."""


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return `quantization_config` of config.json, or of its text model."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (raw, raw.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                return part[key]
    return None


def _scheme(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, _Stored]:
    """Return the weights that are stored quantised, by name."""
    method = str(config.get("quant_method", "")).lower()
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    schemes: dict[str, Callable[[Path, Mapping[str, Any], TensorFiles], dict[str, _Stored]]] = {
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed_tensors,
    }
    if method not in schemes:
        raise mistake(
            f"{folder}/config.json: the weights are stored as {method or 'something without a quant_method'}, "
            f"which is not read here (read are: {', '.join(schemes)})",
            _FIX,
        )
    return schemes[method](folder, config, files)


def _fp8(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, _Stored]:
    """Find DeepSeek's and Qwen's blocks: `X.weight` in 8 bits and `X.weight_scale_inv`, one factor a block."""
    block = _block(folder, config.get("weight_block_size"))
    stored_weights: dict[str, _Stored] = {}
    for name in files.names:
        for suffix in ("_scale_inv", ".scale"):
            weight = name.removesuffix(suffix) if suffix == "_scale_inv" else f"{name.removesuffix(suffix)}.weight"
            if name.endswith(suffix) and weight in files.names and files.entries[weight].dtype == "F8_E4M3":
                _check_blocks(files, weight, name, block)
                stored_weights[weight] = _Stored(
                    parts={"": weight, "scale": name},
                    dequantize=lambda parts, dtype: scaled(parts[""], parts["scale"], block, dtype),
                )
    return _some(folder, "fp8", stored_weights)


def _mxfp4(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, _Stored]:
    """Find experts of gpt-oss: `X_blocks`, two 4-bit values a byte, and `X_scales`, a power of two for 32 values."""
    stored_weights = {}
    for name in files.names:
        weight = name.removesuffix("_blocks")
        if weight != name and f"{weight}_scales" in files.names:
            stored_weights[weight] = _Stored(
                parts={"blocks": name, "scales": f"{weight}_scales"}, dequantize=_mxfp4_value
            )
    return _some(folder, "mxfp4", stored_weights)


def _mxfp4_value(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=dtype)


def _bitsandbytes(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, _Stored]:
    """Find `X.weight` with `X.SCB` (8 bits), or with `X.weight.absmax` and its quantisation state (4 bits)."""
    stored_weights: dict[str, _Stored] = {}
    for name in files.names:
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            stored_weights[weight] = _Stored(
                parts={"": weight, "scale": name},
                dequantize=lambda parts, dtype: (parts[""].float() * (parts["scale"].float() / 127)[:, None]).to(dtype),
            )
        elif ".quant_state.bitsandbytes__" in name:
            weight = name.partition(".quant_state.bitsandbytes__")[0]
            parts = {
                part_name.removeprefix(f"{weight}."): part_name
                for part_name in files.names
                if part_name.startswith(f"{weight}.")
            }
            stored_weights[weight] = _Stored(parts={"": weight} | parts, dequantize=quantize.stored_4bit)
    for name in [name for name in files.names if name.endswith(".weight_format")]:  # of 8 bits: the layout of its row
        weight = f"{name.removesuffix('.weight_format')}.weight"
        if weight in stored_weights:
            stored_weights[weight] = _Stored(
                parts={**stored_weights[weight].parts, "format": name}, dequantize=stored_weights[weight].dequantize
            )
    return _some(folder, "bitsandbytes", stored_weights)


def _compressed_tensors(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, _Stored]:
    """Find `X.weight` in 8 bits and `X.weight_scale`: one factor for the tensor, for each row, or for each block.

    Source: https://github.com/vllm-project/compressed-tensors, its formats float-quantized and int-quantized.
    """
    if config.get("quantization_status") == "frozen" and not config.get("config_groups"):
        return {}
    formats = {str(config.get("format"))} | {
        str(group["format"]) for group in config.get("config_groups", {}).values() if group.get("format")
    }
    wrong = sorted(formats - {"float-quantized", "int-quantized", "naive-quantized"})
    if (
        wrong
        or config.get("transform_config")
        or config.get("sparsity_config", {}).get("format") not in (None, "dense")
    ):
        raise mistake(
            f"{folder}/config.json: the weights are stored as compressed-tensors {', '.join(wrong) or 'transformed'}, "
            "of which 8-bit formats with plain scales are read here",
            _FIX,
        )
    weights = [group.get("weights") or {} for group in config.get("config_groups", {}).values()]
    if any(
        not weight_config.get("symmetric", True) or weight_config.get("num_bits", 8) != 8 for weight_config in weights
    ):
        raise mistake(f"{folder}/config.json: compressed-tensors with zero points or other than 8 bits", _FIX)
    blocks = {
        tuple(weight_config["block_structure"]) for weight_config in weights if weight_config.get("block_structure")
    }
    block = _block(folder, list(blocks.pop()) if len(blocks) == 1 else None)
    stored_weights = {}
    for name in files.names:
        weight = name.removesuffix("_scale")
        if name.endswith(".weight_scale") and weight in files.names:
            _check_blocks(files, weight, name, block, rows_too=True)
            stored_weights[weight] = _Stored(
                parts={"": weight, "scale": name},
                dequantize=lambda parts, dtype: scaled(parts[""], parts["scale"], block, dtype),
            )
    return _some(folder, "compressed-tensors", stored_weights)


def _some(folder: Path, method: str, stored_weights: dict[str, _Stored]) -> dict[str, _Stored]:
    """Refuse a config that names a storage of which the files hold nothing: other files, or another spelling."""
    if not stored_weights:
        raise mistake(
            f"{folder}/config.json says that the weights are stored as {method}, and the files hold none that are",
            "remove quantization_config if the weights are plain, or fetch the files that belong to the config",
        )
    return stored_weights


def _block(folder: Path, sizes: Any) -> tuple[int, int] | None:
    if sizes is None:
        return None
    if not (isinstance(sizes, list | tuple) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)):
        raise mistake(f"{folder}/config.json: blocks of {sizes!r}; two sizes are expected", _FIX)
    return (sizes[0], sizes[1])


def _check_blocks(
    files: TensorFiles, weight: str, scale: str, block: tuple[int, int] | None, *, rows_too: bool = False
) -> None:
    """Refuse scales that do not lie over the weight as the config says.

    Raises:
        RecipeError: another number of scales than blocks.
    """
    rows, columns = files.entries[weight].shape[-2:]
    shape = files.entries[scale].shape
    fits = {(), (1,), (1, 1)}
    if block is not None:
        fits.add((-(-rows // block[0]), -(-columns // block[1])))
    if rows_too:
        fits |= {(rows, 1), (rows,)}
    if shape not in fits:
        raise mistake(
            f"{files.entries[scale].file}: {scale} has shape {shape} over a weight of {(rows, columns)}; "
            f"{'blocks of ' + str(block) if block else 'one factor a tensor'} was expected",
            "fetch config.json and files again, from one revision",
        )


def scaled(weight: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Return `weight` [rows, columns] times its factors: one, one a row, or one a block (cut at the edges)."""
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    rows, columns = weight.shape
    if factors.numel() == 1:
        factors = factors.reshape(1, 1)
    elif factors.numel() == rows and (factors.ndim == 1 or factors.shape == (rows, 1)):
        factors = factors.reshape(rows, 1)
    else:
        assert block is not None
        factors = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * factors).to(dtype)
