"""What tools say of an adapter beside its rank and scale, and of tokens that they add."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distft.importers.conversion import Conversion
from distft.importers.section import Section

_SAME_INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva")
"""Values of PEFT's init_lora_weights that are the method's `init` by the same names."""
_EXACT = "exact singular vectors here, approximate ones there"
_ROWS = "new rows start as the mean of the pieces that the text was split into, and are trained"
_INIT_FIX = f"known: {', '.join(_SAME_INITS)}, loftq, pissa_niter_N"


@dataclass(frozen=True, kw_only=True)
class LoraKeys:
    """What a tool calls these settings of LoRA; empty: it has none."""

    plus_ratio: str = ""
    """LoRA+'s ratio of the rates of B and A."""
    target_parameters: str = ""
    """Experts in one tensor."""
    layers: str = ""
    """Indices of blocks."""
    init: str = ""
    """PEFT's init_lora_weights."""
    start: str = ""
    """An adapter to go on from."""


def set_lora_extras(work: Conversion, section: Section, keys: LoraKeys) -> None:
    """Set [method] lora_plus_ratio, target_parameters, layers_to_transform, init and start, where the file has them."""
    if keys.plus_ratio and section.has(keys.plus_ratio):
        ratio = section.number(keys.plus_ratio)
        work.set("method.lora_plus_ratio", ratio, (section, keys.plus_ratio), "of the rates of B and A")
    if keys.target_parameters and section.has(keys.target_parameters):
        _set_target_parameters(work, section, keys.target_parameters)
    if keys.layers and section.has(keys.layers):
        value = section.raw(keys.layers)
        layers = value if isinstance(value, list) else [value]
        if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            work.set("method.layers_to_transform", layers, (section, keys.layers))
        else:
            section.problem(keys.layers, "must be indices of blocks, as [0, 1]")
    if keys.init and section.has(keys.init):
        _set_init(work, section, keys.init)
    if keys.start and section.has(keys.start):
        work.set(
            "method.start", section.text(keys.start), (section, keys.start), "base, layers and ranks must be the same"
        )


def _set_target_parameters(work: Conversion, section: Section, key: str) -> None:
    if work.draft.get("method.target_modules") == "all-linear":
        section.reading.read.add(section.path(key))
        work.leave(section, key, '"all-linear" adapts the experts too')
    else:
        work.set("method.target_parameters", section.texts(key), (section, key))


def _set_init(work: Conversion, section: Section, key: str) -> None:
    value = section.raw(key)
    if value is True or value is None:
        return
    if value in _SAME_INITS:
        work.set("method.init", value, (section, key))
    elif isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value):
        work.set("method.init", "pissa", (section, key), _EXACT)
    elif value == "loftq":
        work.set("method.init", "loftq", (section, key), "one iteration")
    else:
        section.problem(key, "is no start of an adapter here", _INIT_FIX)


def set_pissa(work: Conversion, section: Section, key: str) -> None:
    """Set `init = "pissa"` where a flag asks for it."""
    if section.flag(key):
        work.set("method.init", "pissa", (section, key), f"{_EXACT}; final/ fits the unchanged base")


def set_new_tokens(work: Conversion, section: Section, key: str, ours: str) -> None:
    """Set [model] add_tokens or add_special_tokens, from a list or from names between commas."""
    if not section.has(key):
        return
    if isinstance(section.raw(key), dict):
        fix = "change the tokenizer in its folder, and name it as [model] tokenizer"
        section.problem(key, "gives the tokenizer's own tokens other names", fix)
        return
    work.set(f"model.{ours}", section.texts(key), (section, key), _ROWS)
