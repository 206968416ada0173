"""The model that an adapter belongs to, or that fine-tunes started from: its names, and its values one at a time.

Nothing whole is held: values are read from mapped files by transformers' own rules for names (decision 55), and where
the run had its base in 4 bits they are the values that the run's forwards computed with (decision 90).
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distft.model import load, quantize
from distft.model.heads import HEADS
from distft.model.layout import FileLayout
from distft.model.random_weights import RandomSource
from distft.model.weights import SafetensorsSource

if TYPE_CHECKING:
    from distft.model.heads.spec import HeadSpec
    from distft.model.quant_params import QuantParams

ModuleKind = Literal["linear", "conv1d", "embedding", "other"]
CPU = torch.device("cpu")
_MAPPED_BYTES = 2**29
_HASHED = ("*.safetensors", "*.safetensors.index.json", "config.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def base_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file that a base's values come from.

    Files of the hub's cache are called by their sha256 there, and taken at their word.
    """
    return {file.name: _sha256(file) for pattern in _HASHED for file in sorted(folder.glob(pattern))}


def _sha256(file: Path) -> str:
    real = file.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class TrainedIn4bit:
    """A base that the run quantised while loading."""

    params: QuantParams
    dtype: torch.dtype
    """The run's dtype: what it quantised, and what it dequantised to."""


class BaseModel:
    """Names, shapes and values of a model's folder."""

    def __init__(
        self,
        folder: Path,
        *,
        head: HeadSpec | None = None,
        in_4bit: TrainedIn4bit | None = None,
        new_tokens: Iterable[int] = (),
    ) -> None:
        """Read config and headers.

        `new_tokens`: ids whose rows an adapter brings. Where they go on behind the vocabulary's last row without a gap,
        embedding and head have rows for them, which hold the mean of the others.

        Raises:
            RecipeError: the folder is no model that transformers knows, or its files do not fit its config.
        """
        self.folder, self.head = folder, head or HEADS["lm"]
        self.config = self.head.prepare(load.read_config(folder))
        stored = self.lm = skeleton(self.config, self.head)
        rows, ids = self.config.get_text_config(decoder=True).vocab_size, set(new_tokens)
        if ids and max(ids) >= rows and ids >= set(range(rows, max(ids) + 1)):
            self.config = copy.deepcopy(self.config)
            self.config.get_text_config(decoder=True).vocab_size = max(ids) + 1
            self.lm = skeleton(self.config, self.head)
        self.layout = FileLayout(self.lm)
        self.tied: Mapping[str, str] = dict(getattr(self.lm, "all_tied_weights_keys", None) or {})
        """Tensor that shares another's values -> that other."""
        self.parameters: Mapping[str, Tensor] = {
            name: param for name, param in self.lm.named_parameters() if name not in self.tied
        }
        """Meta tensors by name, tied ones once."""
        self.buffers = tuple(_saved_buffers(self.lm))
        self.kinds = {name: _kind(module) for name, module in self.lm.named_modules() if name}
        fresh = RandomSource(self.lm, 0, torch.float32)
        self._source = SafetensorsSource(folder, stored, torch.float32, head=self.head, fresh=fresh)
        self._in_4bit, self._mapped_bytes = in_4bit, 0
        self._marked: dict[str, tuple[nn.Module, str]] = {}
        if in_4bit is not None:
            marked = skeleton(self.config, self.head, in_4bit.dtype)
            quantize.store_in_4bit(marked, in_4bit.params, in_4bit.dtype)
            self._marked = quantize.names_in_4bit(marked)

    @property
    def dtype(self) -> torch.dtype:
        """The type that config.json gives the weights; fp32 where it says nothing."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def num_in_4bit(self) -> int:
        """Tensors whose values went through 4 bits."""
        return len(self._marked)

    @property
    def unset(self) -> frozenset[str]:
        """Parameters of the head that the files do not hold, and that start at random."""
        return self._source.absent

    @property
    def names_in_4bit(self) -> frozenset[str]:
        """Names of these tensors."""
        return frozenset(self._marked)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a parameter's shape, tied ones by either name; None: the model has no such parameter."""
        meta = self.parameters.get(self.tied.get(name, name))
        return None if meta is None else tuple(meta.shape)

    def value(self, name: str) -> Tensor:
        """Return a parameter's value in fp32, in memory of its own.

        Raises:
            RecipeError: what is stored is damaged.
        """
        module_name, _, short = name.rpartition(".")
        module = self.lm.get_submodule(module_name)
        stand_in: Any = copy.copy(module)
        stand_in._parameters = dict.fromkeys(module._parameters) | {short: module._parameters[short]}
        value = self._source.values(module_name, stand_in, CPU)[short]
        self._mapped_bytes += value.numel() * value.element_size()
        if self._mapped_bytes > _MAPPED_BYTES:  # pages of mapped files count as this process's until they are unmapped
            self._source.close()
            self._mapped_bytes = 0
        wanted = self.parameters[self.tied.get(name, name)].shape
        if wanted and (more := wanted[0] - value.shape[0]) > 0:
            value = torch.cat([value, value.mean(0, keepdim=True).expand(more, *value.shape[1:])])
        if name in self._marked:
            assert self._in_4bit is not None
            holder, holder_short = self._marked[name]
            value = quantize.round_trip(holder, holder_short, value.to(self._in_4bit.dtype)).float()
        return value

    def buffer(self, name: str) -> Tensor:
        """Return a buffer that belongs to the weights, in the type it is stored in."""
        value = self._source.buffer(name, CPU)
        return dict(self.lm.named_buffers())[name].clone() if value is None else value

    def filled(self, dtype: torch.dtype) -> Any:
        """Return transformers' model with all values, as `dtype`, for forwards."""
        lm = skeleton(self.config, self.head)
        for name in self.parameters:
            holder, _, short = name.rpartition(".")
            value = nn.Parameter(self.value(name).to(dtype), requires_grad=False)
            lm.get_submodule(holder)._parameters[short] = value
        for name in self.buffers:
            holder, _, short = name.rpartition(".")
            lm.get_submodule(holder)._buffers[short] = self.buffer(name)
        lm.tie_weights()
        return lm.eval()


def skeleton(config: Any, head: HeadSpec, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model of a config, parameters on the meta device, buffers as constructors make them."""
    from accelerate import init_empty_weights

    from distft.model.heads import put_head

    with init_empty_weights(include_buffers=False):
        lm = head.auto_class(config).from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    put_head(lm, head)
    lm.tie_weights()
    return lm


def is_finite(value: Tensor) -> bool:
    """Return whether all values are finite, without a copy of the tensor."""
    low, high = torch.aminmax(value)  # NaN is the least and the greatest
    return bool(torch.isfinite(low) & torch.isfinite(high))


def untied_config(config: Any) -> Any:
    """Return a copy of the config whose head has weights of its own."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", None) is not None:
            part.tie_word_embeddings = False
    return config


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def _saved_buffers(lm: nn.Module) -> Iterator[str]:
    for name, module in lm.named_modules():
        for short, buffer in module._buffers.items():
            if buffer is not None and short not in module._non_persistent_buffers_set:
                yield f"{name}.{short}" if name else short


def _kind(module: nn.Module) -> ModuleKind:
    if isinstance(module, nn.Linear):
        return "linear"
    if (type(module).__name__, type(module).__module__) == ("Conv1D", "transformers.pytorch_utils"):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"
