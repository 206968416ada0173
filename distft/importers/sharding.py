"""How a tool spreads a model over GPUs, as [engine]: DeepSpeed's JSON file, and transformers' settings of FSDP.

Losses are the same under every engine, so what is not found is no mistake: it costs memory or time, never results.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distft.core.errors import RecipeError
from distft.importers.config_file import read_json
from distft.importers.conversion import Conversion
from distft.importers.section import Section

_STAGE = re.compile(r"z(?:ero)?[-_]?(?:stage)?[-_]?([0-3])", re.IGNORECASE)
_STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
_OPERATIONS = (
    "zero_optimization", "bf16", "fp16", "gradient_accumulation_steps", "train_batch_size",
    "train_micro_batch_size_per_gpu", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients", "dump_state", "amp", "comms_logger",
    "activation_checkpointing", "flops_profiler", "aio", "compile", "autotuning", "tensorboard", "wandb",
)  # fmt: skip
"""Keys of a DeepSpeed file that change no result, or that transformers fills in from the training arguments."""


def set_deepspeed(work: Conversion, section: Section, key: str) -> bool:
    """Set [engine] from a DeepSpeed file or mapping; return whether there was one."""
    value = section.raw(key)
    if not value:
        return False
    if isinstance(value, dict):
        _from_content(work, section, key, value, "the mapping")
        return True
    if not isinstance(value, str):
        section.problem(key, "must be the path of a JSON file, or a mapping")
        return True
    path = find_beside(work, value)
    if path is not None:
        try:
            content = read_json(path)
        except RecipeError as error:
            for problem in error.problems:
                section.problem(key, f"{problem.message}", problem.fix)
            return True
        _from_content(work, section, key, content, path.name)
        return True
    name = Path(value).name
    stage = _STAGE.search(name)
    if stage is None:
        work.leave(section, key, "the file is not here and its name says no ZeRO stage: engine auto decides")
        return True
    note = f"{name} is not here; stage and offload were read from its name"
    offload = "" if "offload" not in name.lower() else "all" if "all" in name.lower() else "optimizer"
    _set_engine(work, section, key, int(stage[1]), offload, note)
    return True


def find_beside(work: Conversion, name: str) -> Path | None:
    """Return a file that the configuration names: from here, else from the configuration's folder or one above it."""
    here = work.reading.file.path.parent
    places = [Path(name).expanduser(), *(folder / name for folder in (here, *here.resolve().parents[:3]))]
    return next((place for place in places if place.is_file()), None)


def _from_content(work: Conversion, section: Section, key: str, content: dict[str, Any], name: str) -> None:
    zero = content.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in _STAGES:
        section.problem(key, f"zero_optimization.stage of {name} is {stage!r}", "known: 0, 1, 2, 3")
        return
    params, states = (_device(zero.get(part)) for part in ("offload_param", "offload_optimizer"))
    offload = "all" if params != "none" and stage == 3 else "optimizer" if states != "none" and stage else ""
    notes = ["offloaded to host memory here, to NVMe there"] if "nvme" in (params, states) else []
    others = [setting for setting in content if setting not in _OPERATIONS and setting != "gradient_clipping"]
    for setting in ("optimizer", "scheduler"):
        if setting in others:
            others.remove(setting)
            notes.append(f"its {setting} is not read: those of this file are taken")
    if others:
        notes.append(f"not read: {', '.join(map(str, others))}")
    _set_engine(work, section, key, stage, offload, "; ".join([f"stage {stage} of {name}", *notes]))
    clip = content.get("gradient_clipping")
    if isinstance(clip, int | float) and not isinstance(clip, bool) and work.draft.get("train.max_grad_norm") != clip:
        work.set("train.max_grad_norm", float(clip) if clip else "off", (section, key), f"gradient_clipping of {name}")


def _device(part: object) -> str:
    return str(part.get("device", "none")) if isinstance(part, dict) else "none"


def _set_engine(work: Conversion, section: Section, key: str, stage: int, offload: str, note: str) -> None:
    if offload == "all" and stage != 3:
        offload = "optimizer"
    work.set("engine.name", _STAGES[stage], (section, key), note)
    if offload and stage:
        work.set("engine.offload", offload, (section, key))


_SHARDS = {
    "full_shard": {},
    "shard_grad_op": {"gather": "once_a_step"},
    "hybrid_shard": {"shard_within": "node"},
    "hybrid_shard_zero2": {"shard_within": "node", "gather": "once_a_step"},
}
_SHARD_NOTES = {
    "full_shard": "",
    "shard_grad_op": "weights stay whole within a step, as under SHARD_GRAD_OP",
    "hybrid_shard": "cut within a node and repeated over nodes",
    "hybrid_shard_zero2": "cut within a node, weights whole within a step",
}
_NUMBERS = {"1": "full_shard", "2": "shard_grad_op", "3": "no_shard", "4": "hybrid_shard", "5": "hybrid_shard_zero2"}
_FSDP_OPERATIONS = (
    "version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "limit_all_gathers",
    "sync_module_states", "use_orig_params", "cpu_ram_efficient_loading", "state_dict_type", "backward_prefetch",
    "backward_prefetch_policy", "forward_prefetch", "final_state_dict_type", "mixed_precision_policy",
    "cpu_offload_pin_memory", "xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt",
)  # fmt: skip
"""Settings that need no counterpart: fsdp2 here wraps block by block, and loads and saves in its own way."""


def _settings(work: Conversion, section: Section, config: str) -> Section:
    """Return the mapping at a key, or that of the JSON file which it names."""
    value = section.raw(config)
    if not isinstance(value, str):
        return section.section(config)
    path, content = find_beside(work, value), {}
    if path is None:
        work.leave(section, config, "the file is not here: its settings are not read")
    else:
        try:
            content = read_json(path)
        except RecipeError as error:
            section.problem(config, error.problems[0].message)
    return Section(reading=section.reading, location=section.path(config), values=content)


def set_fsdp(work: Conversion, section: Section, key: str, config: str) -> bool:
    """Set [engine] from `fsdp` (words) and `fsdp_config` (a mapping); return whether there was any."""
    value, settings = section.raw(key), _settings(work, section, config)
    if not value and not settings.values:
        return False
    if value is True:
        words = ["full_shard"]
    elif isinstance(value, str):
        words = value.replace(",", " ").split()
    else:
        words = section.texts(key)
    by_name = {name.removeprefix("fsdp_"): name for name in settings.values}
    origin = (section, key if value else config)
    sharding = next((word.lower() for word in words if word.lower() in {*_SHARDS, "no_shard"}), None)
    if name := by_name.get("sharding_strategy"):
        strategy = str(settings.raw(name)).lower()
        sharding = sharding or _NUMBERS.get(strategy, strategy)
    again = by_name.get("reshard_after_forward")
    if again and isinstance(settings.raw(again), bool | str):
        strategy = str(settings.raw(again)).lower()
        sharding = sharding or {"true": "full_shard", "false": "shard_grad_op"}.get(strategy, strategy)
    sharding = sharding or "full_shard"
    if sharding == "no_shard":
        work.set("engine.name", "ddp", origin, "NO_SHARD there")
    elif sharding not in _SHARDS:
        section.problem(
            origin[1], f"sharding strategy {sharding} is not known", f"known: {', '.join(_SHARDS)}, no_shard"
        )
    else:
        version = settings.raw(by_name["version"]) if "version" in by_name else section.raw("fsdp_version")
        two = str(version) == "2"
        note = "" if two else "FSDP there; FSDP2 here"
        work.set("engine.name", "fsdp2", origin, "; ".join(filter(None, (note, _SHARD_NOTES[sharding]))))
        for setting, setting_value in _SHARDS[sharding].items():
            work.set(f"engine.{setting}", setting_value, origin)
    offload = by_name.get("offload_params")
    if "offload" in words or (offload and settings.flag(offload)):
        work.set("engine.offload", "all", origin)
    if (name := by_name.get("activation_checkpointing")) and settings.flag(name):
        work.set("train.activation_checkpointing", "full", (settings, name))
    for name in settings.values:
        if name.removeprefix("fsdp_") in _FSDP_OPERATIONS:
            settings.raw(name)
    work.settle(settings, {})
    return True
