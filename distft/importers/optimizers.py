"""Optimizers and schedules of transformers, which Axolotl, LLaMA-Factory and TRL use, as they are here."""

from __future__ import annotations

from dataclasses import dataclass

from distft.importers.conversion import Conversion
from distft.importers.section import Section

_OTHER_BLOCKS = "torchao's 8-bit blocks there, bitsandbytes' here: rounded otherwise"
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "adamw": ("adamw", ""),
    "adamw_hf": ("adamw", ""),
    "adamw_torch": ("adamw", ""),
    "adamw_torch_fused": ("adamw", ""),
    "adamw_torch_npu_fused": ("adamw", ""),
    "adamw_apex_fused": ("adamw", ""),
    "adamw_8bit": ("adamw_8bit", ""),
    "adamw_bnb_8bit": ("adamw_8bit", ""),
    "adamw_torch_8bit": ("adamw_8bit", _OTHER_BLOCKS),
    "ao_adamw_8bit": ("adamw_8bit", _OTHER_BLOCKS),
    "adamw_torch_4bit": ("adamw_4bit", ""),
    "ao_adamw_4bit": ("adamw_4bit", ""),
    "ao_adamw_fp8": ("adamw_fp8", ""),
    "paged_adamw": ("paged_adamw_32bit", ""),
    "paged_adamw_32bit": ("paged_adamw_32bit", ""),
    "paged_adamw_8bit": ("paged_adamw_8bit", ""),
    "lion_32bit": ("lion", ""),
    "lion": ("lion", ""),
    "paged_lion_32bit": ("lion", "not paged here: more GPU memory"),
}
"""Name there -> name here, and what is different."""

WHY_NOT = {
    "adafactor": "takes the learning rate as it is; adafactor here scales it by the size of each "
    "weight, another method",
}
"""Names that are here too, or nearly, and mean something else."""

_LION_BETAS = "Adam's betas, which transformers gives to lion too; lion's own are 0.9 and 0.99"
DEFAULT_BETAS = (0.9, 0.999)
DEFAULT_EPS = 1e-8


def set_optimizer(work: Conversion, section: Section, key: str, default: str) -> str | None:
    """Set [optim] name, betas and eps; return the name here, None for one that is refused."""
    name = section.text(key, default)
    if name is None:
        return None
    name = name.removeprefix("OptimizerNames.").lower()
    if name not in OPTIMIZERS:
        why = WHY_NOT.get(name, "is not an optimizer here, and another one would train another model")
        section.problem(key, why, f"known: {', '.join(OPTIMIZERS)}")
        return None
    here, note = OPTIMIZERS[name]
    if name != here and not note:
        note = f"{name} there"
    elif name != here:
        note = f"{name} there: {note}"
    work.set("optim.name", here, (section, key), note)
    return here


def set_moments(work: Conversion, section: Section, optimizer: str | None, *, beta1: str, beta2: str, eps: str) -> None:
    """Set betas and eps where they are set there, or differ from the defaults here."""
    betas = [section.number(beta1, DEFAULT_BETAS[0]), section.number(beta2, DEFAULT_BETAS[1])]
    value = section.number(eps)
    origin = (section, beta1 if section.has(beta1) else beta2)
    if optimizer == "lion":
        work.set("optim.betas", betas, origin, _LION_BETAS)
        if value is not None:
            work.leave(section, eps, "lion has no eps")
        return
    if section.has(beta1) or section.has(beta2):
        work.set("optim.betas", betas, origin)
    if value is not None:
        work.set("optim.eps", value, (section, eps))


@dataclass(frozen=True, kw_only=True)
class ScheduleKeys:
    """What a tool calls the settings of its schedule, and what it means without them."""

    name: str = "lr_scheduler_type"
    default: str = "linear"
    kwargs: str = "lr_scheduler_kwargs"
    warmup_steps: str = "warmup_steps"
    warmup_ratio: str = "warmup_ratio"
    default_ratio: float = 0.0
    default_note: str = ""


_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",
    "warmup_stable_decay": "wsd",
}


def set_schedule(work: Conversion, section: Section, keys: ScheduleKeys) -> None:
    """Set [schedule]."""
    name = section.text(keys.name, keys.default)
    name = (name or keys.default).removeprefix("SchedulerType.").lower()
    if name not in _SCHEDULES:
        why = "is not a schedule here, and another one trains at other learning rates"
        section.problem(keys.name, why, f"known: {', '.join(_SCHEDULES)}")
        return
    here = _SCHEDULES[name]
    note = "" if name == here else f"{name} there"
    work.set("schedule.name", here, (section, keys.name), note)
    _set_kwargs(work, section, keys, name)
    if name == "constant":
        for key in (keys.warmup_steps, keys.warmup_ratio):
            if section.raw(key):
                work.leave(section, key, "constant has no warm-up there (constant_with_warmup has)")
        return
    _set_warmup(work, section, keys)


def _set_warmup(work: Conversion, section: Section, keys: ScheduleKeys) -> None:
    steps, ratio = section.number(keys.warmup_steps), section.number(keys.warmup_ratio)
    if steps and ratio:
        work.leave(section, keys.warmup_ratio, f"{keys.warmup_steps} counts more")
    if steps:
        if steps < 1:  # transformers 5 takes a share there too
            work.set("schedule.warmup_ratio", steps, (section, keys.warmup_steps), "a share of all steps")
        elif steps == int(steps):
            work.set("schedule.warmup_steps", int(steps), (section, keys.warmup_steps))
        else:
            section.problem(keys.warmup_steps, "must be a whole number, or a share below 1")
    elif ratio:
        work.set("schedule.warmup_ratio", ratio, (section, keys.warmup_ratio))
    elif steps is None and ratio is None and keys.default_ratio:
        work.set("schedule.warmup_ratio", keys.default_ratio, (section, keys.warmup_ratio), keys.default_note)


def _set_kwargs(work: Conversion, section: Section, keys: ScheduleKeys, name: str) -> None:
    kwargs = section.section(keys.kwargs) if section.has(keys.kwargs) else None
    if name == "cosine_with_min_lr":
        _set_minimum(work, section, keys, kwargs)
    elif name == "warmup_stable_decay":
        _set_stable_decay(work, section, keys, kwargs)
    cycles = kwargs.number("num_cycles") if kwargs is not None else None
    whole = name == "cosine_with_restarts"
    if kwargs is not None and cycles is not None and cycles != (1 if whole else 0.5):
        kwargs.problem("num_cycles", "gives another curve than cosine has here, once from the peak to the end")
    for key in kwargs.values if kwargs is not None else ():
        if kwargs is not None and kwargs.path(key) not in kwargs.reading.read:
            kwargs.problem(key, f"is not a setting of a {_SCHEDULES[name]} schedule here")


def _set_minimum(work: Conversion, section: Section, keys: ScheduleKeys, kwargs: Section | None) -> None:
    ratio = kwargs.number("min_lr_rate") if kwargs is not None else None
    lowest = kwargs.number("min_lr") if kwargs is not None else None
    if kwargs is not None and ratio is not None:
        work.set("schedule.min_ratio", ratio, (kwargs, "min_lr_rate"))
        return
    peak = section.number("learning_rate")
    if kwargs is None or lowest is None or not peak:
        section.problem(keys.name, f"needs min_lr_rate in {keys.kwargs}, or min_lr and learning_rate")
        return
    note = f"min_lr {lowest:g} there, of the peak {peak:g}"
    work.set("schedule.min_ratio", lowest / peak, (kwargs, "min_lr"), note)


def _set_stable_decay(work: Conversion, section: Section, keys: ScheduleKeys, kwargs: Section | None) -> None:
    decay = kwargs.number("num_decay_steps") if kwargs is not None else None
    total = section.whole("max_steps")
    if kwargs is None or not decay or not total or total < 1:
        section.problem(keys.name, f"needs num_decay_steps in {keys.kwargs} and max_steps: the decay is a share here")
        return
    shape = kwargs.text("decay_type", "cosine")
    if shape != "linear":
        fix = 'write decay_type: linear, or take schedule "cosine" or "linear"'
        kwargs.reading.problem(
            kwargs.path("decay_type") if kwargs.has("decay_type") else section.path(keys.name),
            f"decays by {shape}; wsd here decays linearly, at other learning rates",
            fix,
        )
        return
    note = f"the last {decay:g} of {total} steps"
    work.set("schedule.decay_ratio", decay / total, (kwargs, "num_decay_steps"), note)
    lowest = kwargs.number("min_lr_ratio")
    if lowest is not None:
        work.set("schedule.min_ratio", lowest, (kwargs, "min_lr_ratio"))
    kwargs.raw("num_stable_steps")
