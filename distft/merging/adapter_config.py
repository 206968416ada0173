"""adapter_config.json of a PEFT adapter: the keys that decide what its tensors mean, read and checked.

Every key is one of three kinds: it enters a formula, it has no effect on the values of the weights, or it changes how
the tensors are to be read in a way that is not understood here. A key of the third kind with a value that is not off,
and a key that is not known at all, is refused: what it means would be left out of the result without a word.
Source: peft 0.21, `peft/tuners/lora/config.py`, `ia3/config.py`, `trainable_tokens/config.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distft.core.errors import Problem, RecipeError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KINDS = ("LORA", "IA3", "TRAINABLE_TOKENS")
_PROMPTS = (
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
)

_FORMULA = {"r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out", "rank_pattern",
            "alpha_pattern", "target_modules", "target_parameters", "exclude_modules", "modules_to_save",
            "trainable_token_indices", "token_indices", "feedforward_modules", "layers_to_transform",
            "ensure_weight_tying", "init_lora_weights"}  # fmt: skip
_NO_EFFECT = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
              "peft_version", "lora_dropout", "layers_pattern", "runtime_config", "megatron_config", "megatron_core",
              "qalora_group_size", "eva_config", "init_ia3_weights", "init_weights"}  # fmt: skip
"""What only training or loading looks at. `qalora_group_size` counts with `use_qalora`, which is refused."""
_WHY = {
    "alora_invocation_tokens": "the adapter acts behind its invocation tokens only, which no merged weight can",
    "arrow_config": "a router of several adapters is not one change of the weights",
    "corda_config": "CorDA's initialisation changed the base weights",
    "kasa_config": "KaSA truncates the base weights",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "loftq_config": "LoftQ's initialisation changed the base weights",
    "lora_ga_config": "LoRA-GA's initialisation changed the base weights",
    "monteclora_config": "MonteCLoRA draws its weights anew in every forward",
    "use_bdlora": "block-diagonal LoRA stores its matrices in another form",
    "use_qalora": "QALoRA averages its inputs in groups",
    "velora_config": "VeLoRA adapters have not been looked at",
}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""


def adapter_mistake(where: Path | str, message: str, fix: str) -> RecipeError:
    """Return what is wrong with an adapter, a model or an option, as an error that names it."""
    return RecipeError(str(where), [Problem(message=message, fix=fix)])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says of the tensors beside it."""

    folder: Path
    kind: Literal["LORA", "IA3", "TRAINABLE_TOKENS"]
    raw: Mapping[str, Any]
    base: str | None
    """Folder or hub id of the base model, as it was written."""
    revision: str | None
    task_type: str | None
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    feedforward_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ending of an embedding's name -> rows that are trained; the key "" means the input embedding."""
    partial_layers: bool = False
    """layers_to_transform limits the layers, so that not every match of target_modules has tensors."""
    tied: bool = False
    """ensure_weight_tying: what was trained of the embedding is meant for a tied head as well."""

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives a module, by PEFT's own rule for patterns."""
        return int(self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the config gives a module, by PEFT's own rule for patterns."""
        return float(self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha))

    def scale_of(self, module: str) -> float:
        """Return the factor of the product B A: alpha / r, or alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        RecipeError: the file is missing or damaged, or says something that is not understood here.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise adapter_mistake(folder, f"no {CONFIG}", "give a folder in PEFT's form, or a run of distft") from None
    except (OSError, ValueError) as error:
        raise adapter_mistake(path, f"is not JSON: {error}", "fetch or save the adapter again") from None
    if not isinstance(raw, dict):
        raise adapter_mistake(path, "is not a JSON object", "fetch or save the adapter again")
    kind = raw.get("peft_type")
    if kind not in KINDS:
        raise adapter_mistake(path, *_other_kind(kind))
    problems = [*_refused(raw)]
    read = _Values(raw, problems)
    config = AdapterConfig(
        folder=folder,
        kind=kind,
        raw=raw,
        base=read.text("base_model_name_or_path"),
        revision=read.text("revision"),
        task_type=read.text("task_type"),
        rank=read.whole("r") if kind == "LORA" else 0,
        alpha=read.number("lora_alpha") if kind == "LORA" else 0.0,
        rslora=read.flag("use_rslora"),
        dora=read.flag("use_dora"),
        lora_bias=read.flag("lora_bias"),
        bias=read.bias(),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        rank_pattern=read.pattern("rank_pattern", whole=True),
        alpha_pattern=read.pattern("alpha_pattern", whole=False),
        target_modules=read.names("target_modules"),
        target_parameters=read.listed("target_parameters"),
        exclude_modules=read.names("exclude_modules"),
        feedforward_modules=read.names("feedforward_modules"),
        modules_to_save=read.listed("modules_to_save"),
        token_indices=read.tokens(kind),
        partial_layers=raw.get("layers_to_transform") is not None,
        tied=read.flag("ensure_weight_tying"),
    )
    if problems:
        raise RecipeError(str(path), problems)
    return config


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that fits, or the name itself; as `peft.utils.other.get_pattern_key`."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _other_kind(kind: Any) -> tuple[str, str]:
    if kind in _PROMPTS:
        return (
            f"peft_type {kind} trains inputs or prefixes, not weights: there is no merged model that does the same",
            "serve the base with the adapter beside it",
        )
    fix = f"understood are {', '.join(KINDS)}; PEFT's own merge_and_unload may know it"
    return (f"peft_type {kind!r} is not understood here" if kind else "no peft_type", fix)


def _refused(raw: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key, value in raw.items():
        if key in _FORMULA or key in _NO_EFFECT or value in (None, False, {}, [], ""):
            continue
        why = _WHY.get(key, "the key is not known here, and may change what the tensors mean")
        fix = "merge with the PEFT version that wrote it" + (
            "" if key in _WHY else f", or remove it if it has no effect on the weights; known keys: {_known(key)}"
        )
        problems.append(Problem(message=f"{key} = {json.dumps(value)[:80]}: {why}", fix=fix))
    start = raw.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in _PLAIN_STARTS):
        problems.append(
            Problem(
                message=f'init_lora_weights = "{start}": it changed the base weights that the adapter counts on',
                fix="save the adapter again with PEFT's path_initial_model_for_weight_conversion",
            )
        )
    return problems


def _known(key: str) -> str:
    from distft.core.nearest import nearest

    meant = nearest(key, sorted(_FORMULA | _NO_EFFECT | _WHY.keys()))
    return f"did you mean {meant}?" if meant else "those of peft 0.21"


class _Values:
    """Reads keys by type and notes what is of another."""

    def __init__(self, raw: Mapping[str, Any], problems: list[Problem]) -> None:
        self.raw, self.problems = raw, problems

    def _wrong(self, key: str, wanted: str) -> None:
        shown = json.dumps(self.raw.get(key))[:80]
        self.problems.append(Problem(message=f"{key} = {shown}: must be {wanted}", fix="save the adapter again"))

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            self._wrong(key, "a text or null")
            return None
        return value or None

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value not in (None, True, False):
            self._wrong(key, "true or false")
        return value is True

    def whole(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._wrong(key, "a whole number of at least 1")
            return 1
        return value

    def number(self, key: str) -> float:
        value = self.raw.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self._wrong(key, "a number")
            return 1.0
        return float(value)

    def bias(self) -> Any:
        value = self.raw.get("bias") or "none"
        if value not in ("none", "all", "lora_only"):
            self._wrong("bias", '"none", "all" or "lora_only"')
            return "none"
        return value

    def pattern(self, key: str, *, whole: bool) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        kinds = int if whole else (int, float)
        if not isinstance(value, dict) or not all(
            isinstance(number, kinds) and not isinstance(number, bool) and (number >= 1 or not whole)
            for number in value.values()
        ):
            self._wrong(key, "an object of module patterns and numbers")
            return {}
        return value if all([self._compiles(key, text) for text in value]) else {}

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self.raw.get(key)
        if not isinstance(value, str):
            return self.listed(key)
        self._compiles(key, value)
        return value

    def _compiles(self, key: str, text: str) -> bool:
        try:
            re.compile(text)
        except re.error as error:
            self.problems.append(Problem(message=f"{key}: {text!r} is no regular expression: {error}"))
            return False
        return True

    def listed(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._wrong(key, "a list of names")
            return ()
        return tuple(value)

    def tokens(self, kind: str) -> dict[str, tuple[int, ...]]:
        key = "token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
        value = self.raw.get(key) or {}
        by_name = value if isinstance(value, dict) else {"": value}
        if not all(
            isinstance(ids, list) and all(isinstance(token, int) and token >= 0 for token in ids)
            for ids in by_name.values()
        ):
            self._wrong(key, "a list of token ids, or an object of such lists")
            return {}
        return {name: tuple(ids) for name, ids in by_name.items()}
