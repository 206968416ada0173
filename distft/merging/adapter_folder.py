"""A PEFT adapter by its files: which tensor belongs to which module, and what each does to the base.

The config and the header are read first; a tensor is read when its change is asked for. A tensor that is not understood
and one that should be there and is not are both refused, with their names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from distft.core.errors import Problem, RecipeError
from distft.merging.adapter_config import CONFIG, WEIGHTS, AdapterConfig, adapter_mistake, read_adapter_config
from distft.merging.base_model import natural_key
from distft.merging.changes import LowRankChange
from distft.model.stored import FLOATS
from distft.model.tensor_files import Entry, read_header

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "shift",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "factors",
    "token_adapter.trainable_tokens_delta": "tokens",
    "trainable_tokens_delta": "tokens",
}
_MATRICES = {"a", "b", "embedding_a", "embedding_b", "tokens"}
_LONGEST_FIRST = sorted(_PARTS, key=len, reverse=True)
_OWN = re.compile(r"lora_|ia3_|trainable_tokens|vera_|oft_|hada_|lokr_|token_adapter|modules_to_save\.|\.default\.")
_HEADS_BY_PEFT = ("classifier", "score")
"""PEFT adds both to modules_to_save of a classifier, which has one of them; a head that is nowhere is found later."""
_SHOWN = 6


@dataclass(kw_only=True)
class ModuleTensors:
    """The adapter's tensors of one module: part -> key in the file."""

    module: str
    depth: int
    """Wrappers around the base layer inside of this one: PEFT nests a wrapper for each parameter of experts."""
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        """Whether it has a product of two matrices."""
        return "a" in self.keys or "embedding_a" in self.keys


class AdapterFolder:
    """The config and the tensors of an adapter."""

    def __init__(self, folder: Path) -> None:
        """Read config and header.

        Raises:
            RecipeError: a file is missing or damaged, or a tensor is not understood.
        """
        self.folder = folder
        self.config: AdapterConfig = read_adapter_config(folder)
        self.file = folder / WEIGHTS
        if not self.file.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise adapter_mistake(
                folder,
                f"no {WEIGHTS}" + (", only adapter_model.bin, which can run code when it is read" if pickled else ""),
                "save the adapter with PEFT's save_pretrained (safetensors)",
            )
        self.entries: Mapping[str, Entry] = read_header(self.file)
        self.modules: dict[tuple[str, int], ModuleTensors] = {}
        self.whole: dict[str, str] = {}
        """Parameter's name -> key, of tensors that stand in the place of the base's."""
        self._sort()
        self._check_parts()
        self._open: Any = None

    @property
    def label(self) -> str:
        """What messages and tables call it."""
        return self.folder.parent.name if self.folder.name == "final" else self.folder.name

    def digest(self) -> str:
        """Return a sha256 of config and tensors."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            with (self.folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def read(self, key: str) -> Tensor:
        """Return a tensor of the file."""
        if self._open is None:
            self._open = safe_open(self.file, framework="pt").__enter__()
        return self._open.get_tensor(key)

    def low_rank(self, tensors: ModuleTensors, *, transposed: bool) -> LowRankChange:
        """Return the product of one module, which is no parameter of experts.

        Raises:
            RecipeError: shapes that make no product, or another rank than the config's.
        """
        is_embedding = "embedding_a" in tensors.keys
        a = self.read(tensors.keys["embedding_a" if is_embedding else "a"])
        b = self.read(tensors.keys["embedding_b" if is_embedding else "b"])
        rank = self.config.rank_of(tensors.module)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise adapter_mistake(
                self.file,
                f"{tensors.module}: A is {tuple(a.shape)} and B is {tuple(b.shape)}, and the config says rank {rank}",
                "config and tensors belong to different adapters; save it again",
            )
        magnitude = self.read(tensors.keys["magnitude"]).flatten() if "magnitude" in tensors.keys else None
        return LowRankChange(
            a_RI=a,
            b_OR=b,
            scale=self.config.scale_of(tensors.module),
            transposed=transposed or is_embedding,
            magnitude_O=magnitude,
        )

    def low_rank_modules(self) -> dict[str, ModuleTensors]:
        """Return the modules that have a product, in the order of layers."""
        found = [tensors for tensors in self.modules.values() if tensors.is_low_rank]
        return {tensors.module: tensors for tensors in sorted(found, key=lambda t: natural_key(t.module))}

    def refuse_unless_plain(self, operation: str) -> None:
        """Refuse what is more than products of two matrices beside whole tensors.

        Raises:
            RecipeError: names what there is besides.
        """
        config = self.config
        more = [
            (config.kind != "LORA", f"peft_type {config.kind}"),
            (config.dora, "DoRA, whose change depends on the base's norms"),
            (config.lora_bias, "lora_bias"),
            (bool(config.target_parameters), "target_parameters (experts)"),
            (any("tokens" in tensors.keys for tensors in self.modules.values()), "trainable tokens"),
        ]
        if named := [text for present, text in more if present]:
            raise adapter_mistake(
                self.folder,
                f"has {', '.join(named)}: {operation} takes plain LoRA or rsLoRA (and whole tensors)",
                "merge it (distft merge), and extract from the merged model (distft adapters extract)",
            )

    def _sort(self) -> None:
        unknown = []
        for key in self.entries:
            name = key.removeprefix(_PREFIX)
            if name == key:
                unknown.append(key)
                continue
            found = next((suffix for suffix in _LONGEST_FIRST if name.endswith(f".{suffix}")), "")
            if found:
                nested = name.removesuffix(f".{found}")
                module = re.sub(r"(\.base_layer)+$", "", nested)
                depth = nested[len(module) :].count(".base_layer")
                tensors = self.modules.setdefault((module, depth), ModuleTensors(module=module, depth=depth))
                tensors.keys[_PARTS[found]] = key
            elif _OWN.search(name):
                unknown.append(key)
            else:
                self.whole[re.sub(r"(\.base_layer)+\.", ".", name)] = key
        if unknown:
            shown = ", ".join(sorted(unknown)[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
            raise adapter_mistake(
                self.file,
                f"{len(unknown)} tensors that are not understood: {shown}",
                f"names begin with {_PREFIX} and end in {', '.join(_PARTS)}, or are the base's own",
            )

    def _check_parts(self) -> None:
        """Refuse modules of which a part is missing, or has no place in this kind of adapter."""
        problems: list[str] = []
        dora, kind = self.config.dora, self.config.kind
        for key, entry in self.entries.items():
            if entry.dtype not in FLOATS:
                problems.append(f"{key} is stored as {entry.dtype}: adapters in 8 bits or less are not understood")
        for tensors in self.modules.values():
            parts = set(tensors.keys)
            problems += [
                f"{tensors.keys[part]} has {len(shape)} dimensions, not 2"
                for part in sorted(parts & _MATRICES)
                if len(shape := self.entries[tensors.keys[part]].shape) != 2
            ]
            pairs = (("a", "b"), ("embedding_a", "embedding_b"))
            problems += [
                f"{tensors.module}: {one} without {other}"
                for pair in pairs
                for one, other in (pair, pair[::-1])
                if one in parts and other not in parts
            ]
            if tensors.is_low_rank and dora != ("magnitude" in parts):
                problems.append(f"{tensors.module}: {'no' if dora else 'a'} magnitude, and use_dora is {dora}")
            if tensors.is_low_rank and "a" in parts and self.config.lora_bias != ("shift" in parts):
                has = "a" if "shift" in parts else "no"
                problems.append(f"{tensors.module}: {has} bias of B, and lora_bias is {self.config.lora_bias}")
            if ("factors" in parts) != (kind == "IA3"):
                problems.append(f"{tensors.module}: {', '.join(sorted(parts))} in an adapter of kind {kind}")
            if kind == "TRAINABLE_TOKENS" and parts != {"tokens"}:
                problems.append(f"{tensors.module}: {', '.join(sorted(parts))} in an adapter of kind {kind}")
        guessed = _HEADS_BY_PEFT if self.config.task_type == "SEQ_CLS" else ()
        for module in self.config.modules_to_save:
            if module not in guessed and not any(_inside(name, module) for name in self.whole):
                problems.append(f"modules_to_save names {module}, and the file holds none of its tensors")
        if not self.modules and not self.whole:
            problems.append("it holds no tensors")
        if problems:
            listed = [
                Problem(message=message, fix="the file is incomplete, or not the config's; save the adapter again")
                for message in problems[:_SHOWN]
            ]
            raise RecipeError(str(self.file), listed)


def _inside(name: str, module: str) -> bool:
    """Return whether a parameter's name lies in a module that is named by its end."""
    return re.search(rf"(^|\.){re.escape(module)}\.", name) is not None


def matches(module: str, target: str | tuple[str, ...]) -> bool:
    """Return whether `target_modules` and its kind mean this module, by PEFT's rule."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)
