"""A whole model written from values that are asked for one at a time, in the layout of the hub (decision 57)."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.core.errors import DataError
from distft.merging import folder_writer
from distft.merging.adapter_config import adapter_mistake
from distft.merging.base_model import BaseModel, is_finite, skeleton, untied_config
from distft.merging.folder_writer import TensorPlan
from distft.model import quantize
from distft.model.layout import FileLayout
from distft.model.quant_params import QuantParams

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip


@dataclass(kw_only=True)
class PackedError:
    """What storing a merged matrix in 4 bits again costs."""

    name: str
    relative_error: float
    """Norm of (stored - merged) over norm of merged."""
    share_of_change: float
    """Norm of (stored - merged) over norm of (merged - base): above 1 the rounding is larger than the fine-tuning."""


class ModelWriter:
    """Writes the tensors of a model that has the base's architecture."""

    def __init__(
        self, base: BaseModel, dtype: torch.dtype, *, tied: bool, max_file_bytes: int = folder_writer.MAX_FILE_BYTES
    ) -> None:
        """Plan files and names.

        `dtype`: of all parameters; buffers keep theirs. `tied`: whether a head that the base ties stays tied.
        """
        self.base, self.dtype = base, dtype
        self.config = base.config if tied or not base.tied else untied_config(base.config)
        if self.config is base.config:
            names, self.layout = list(base.parameters), base.layout
            self.lm = base.lm
        else:
            self.lm = skeleton(self.config, base.head)
            names, self.layout = [name for name, _ in self.lm.named_parameters()], FileLayout(self.lm)
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in names:
            shape = base.shape(name)
            assert shape is not None
            self._shapes[name] = (dtype, shape)
        for name in base.buffers:
            buffer = base.buffer(name)
            self._shapes[name] = (buffer.dtype, tuple(buffer.shape))
        self._files = self._planned(max_file_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that are written."""
        return tuple(name for name in self._shapes if name not in self.base.buffers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of weights, unquantised."""
        return sum(plan.num_bytes for groups in self._files for _, plans in groups for plan in plans)

    def write(self, folder: Path, value: Callable[[str], Tensor]) -> dict[str, str]:
        """Write all files of weights and return the sha256 of each; `value` gives a parameter in any float type.

        Raises:
            OSError: they cannot be written.
            RecipeError: a value does not fit into the type.
        """
        plans = [[plan for _, group in groups for plan in group] for groups in self._files]
        hashes: dict[str, str] = {}
        for name, groups, planned in zip(folder_writer.file_names(plans), self._files, plans, strict=True):
            hashes[name] = folder_writer.write_tensor_file(folder / name, planned, self._values(groups, value))
        folder_writer.write_index(folder, plans)
        return hashes

    def write_packed(
        self, folder: Path, value: Callable[[str], Tensor], packed: frozenset[str], params: QuantParams
    ) -> list[PackedError]:
        """Write one file in which the matrices `packed` are stored in 4 bits, as bitsandbytes and transformers read it.

        Held in memory: what is written, at most a quarter of the model.

        Raises:
            OSError: it cannot be written.
            RecipeError: a matrix is stored in another layout than it has in memory, or a value does not fit.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        errors = []
        for name in self._shapes:
            merged = self._one(name, value)
            if name not in packed:
                tensors |= self.layout.stored({name: merged})
                continue
            if self.base.kinds.get(name.removesuffix(".weight")) != "linear":
                raise adapter_mistake("--quantize", f"{name}: transformers stores 4 bits of plain linear layers alone",
                                      "leave --quantize out: the merged folder is then in 16 bits")  # fmt: skip
            parts = quantize.packed_4bit(merged, params)
            stored = quantize.stored_4bit(parts, torch.float32)
            off, change = (stored - merged.float()).norm(), (merged.float() - self.base.value(name)).norm()
            errors.append(
                PackedError(
                    name=name,
                    relative_error=float(off / merged.float().norm()),
                    share_of_change=float(off / change) if change > 0 else float("nan"),
                )
            )
            tensors |= {f"{name}.{part}" if part else name: tensor.contiguous() for part, tensor in parts.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        return errors

    def write_rest(self, folder: Path, *beside: Path, quantization: Mapping[str, Any] | None = None) -> None:
        """Write config.json, and what stands beside weights: from the first of the folders that has each.

        Raises:
            OSError: a file cannot be written.
            DataError: no folder holds a tokenizer, or its tokens have no row in the embedding.
        """
        config = copy.deepcopy(self.config)
        config.architectures = [type(self.lm).__name__]
        config.dtype = self.dtype
        config.use_cache = True
        if quantization is not None:
            config.quantization_config = dict(quantization)
        holder = next((place for place in beside if has_tokenizer(place)), None)
        if holder is None:
            raise DataError(
                f"no tokenizer in {' or '.join(map(str, beside))}  copy tokenizer.json and tokenizer_config.json into "
                "the base's folder: a model without its tokenizer cannot be served"
            )
        self._check_tokens(holder)
        self.base.head.finish_config(config, _own_pad_id(holder))
        config.save_pretrained(folder)
        for name in _TOKENIZER:
            if (holder / name).is_file():
                shutil.copyfile(holder / name, folder / name)
        if (holder / "additional_chat_templates").is_dir():
            shutil.copytree(holder / "additional_chat_templates", folder / "additional_chat_templates")
        for place in beside:
            if (place / "generation_config.json").is_file():
                shutil.copyfile(place / "generation_config.json", folder / "generation_config.json")
                return

    def _check_tokens(self, holder: Path) -> None:
        if not (holder / "tokenizer.json").is_file():
            return
        from tokenizers import Tokenizer

        largest = max(Tokenizer.from_file(str(holder / "tokenizer.json")).get_vocab().values(), default=0)
        rows = self.lm.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise DataError(
                f"{holder / 'tokenizer.json'}: its largest token is {largest}, and the embedding has {rows} rows  "
                "use the tokenizer that belongs to the base"
            )

    def _planned(self, max_file_bytes: int) -> list[list[tuple[tuple[str, ...], list[TensorPlan]]]]:
        """Return for each file its groups of parameters and the tensors that each becomes."""
        files: list[list[tuple[tuple[str, ...], list[TensorPlan]]]] = [[]]
        held = 0
        # Wider types first, so that every tensor of a file starts at a multiple of its width.
        groups = sorted(self.layout.groups(self._shapes), key=lambda group: -self._shapes[group[0]][0].itemsize)
        for group in groups:
            metas = {
                name: torch.empty(self._shapes[name][1], dtype=self._shapes[name][0], device="meta") for name in group
            }
            plans = [
                TensorPlan(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
                for name, tensor in self.layout.stored(metas).items()
            ]
            size = sum(plan.num_bytes for plan in plans)
            if held and held + size > max_file_bytes:
                files.append([])
                held = 0
            files[-1].append((group, plans))
            held += size
        return files

    def _values(
        self, groups: list[tuple[tuple[str, ...], list[TensorPlan]]], value: Callable[[str], Tensor]
    ) -> Iterator[Tensor]:
        for group, plans in groups:
            stored = self.layout.stored({name: self._one(name, value) for name in group})
            for plan in plans:
                yield stored.pop(plan.name)

    def _one(self, name: str, value: Callable[[str], Tensor]) -> Tensor:
        if name in self.base.buffers:
            return self.base.buffer(name)
        whole = value(name)
        narrow = whole.to(self._shapes[name][0])
        if not is_finite(narrow):
            wanted = str(self.dtype).removeprefix("torch.")
            message = f"{name}: a value of {float(whole.abs().max()):.3g} does not fit into {wanted}"
            raise adapter_mistake("--dtype", message, "--dtype bfloat16 or float32")
        return narrow


def _own_pad_id(holder: Path) -> int | None:
    """Return the padding token of a tokenizer; None where texts end with it, or it has none.

    A reward is read at the last token that is not padding, and would be read one token early.
    """
    path = holder / "tokenizer_config.json"
    if not path.is_file() or not (holder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    raw = json.loads(path.read_text(encoding="utf-8"))
    pad, end = (token.get("content") if isinstance(token, dict) else token
                for token in (raw.get("pad_token"), raw.get("eos_token")))  # fmt: skip
    if pad is None or pad == end:
        return None
    return Tokenizer.from_file(str(holder / "tokenizer.json")).token_to_id(pad)


def has_tokenizer(place: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
