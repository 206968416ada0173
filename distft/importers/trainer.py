"""Settings of transformers' Trainer, on which Axolotl, LLaMA-Factory and TRL are built: batches, steps, precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from distft.importers.conversion import Conversion
from distft.importers.optimizers import ScheduleKeys, set_moments, set_optimizer, set_schedule
from distft.importers.section import Section
from distft.importers.sharding import set_deepspeed, set_fsdp

DEFAULT_SEED = 42


@dataclass(frozen=True, kw_only=True)
class TrainerKeys:
    """What a tool calls the settings, and what it does without them."""

    micro_batch: str = "per_device_train_batch_size"
    micro_batch_default: int = 8
    accumulation: str = "gradient_accumulation_steps"
    epochs: str = "num_train_epochs"
    epochs_default: float = 3.0
    optimizer: str = "optim"
    optimizer_default: str = "adamw_torch_fused"
    learning_rate_default: float | None = 5e-5
    """None: the file must have one."""
    schedule: ScheduleKeys = field(default_factory=ScheduleKeys)
    sharing: tuple[str, ...] = ()
    """Keys that say how many GPUs share a micro-batch."""
    bf16_default: bool = False
    checkpointing_default: bool = False


def set_training(work: Conversion, section: Section, keys: TrainerKeys, *, evaluates: bool) -> None:
    """Set [optim], [schedule], [train], [engine], [checkpoint], [eval], [log] and the seed.

    Args:
        work: the conversion.
        section: where the settings are.
        keys: what they are called.
        evaluates: the recipe has a [[data.eval]] source.
    """
    optimizer = set_optimizer(work, section, keys.optimizer, keys.optimizer_default)
    _set_rates(work, section, keys)
    set_moments(work, section, optimizer, beta1="adam_beta1", beta2="adam_beta2", eps="adam_epsilon")
    set_schedule(work, section, keys.schedule)
    _set_length(work, section, keys)
    micro = section.whole(keys.micro_batch, keys.micro_batch_default, least=1)
    set_batches(work, section, (keys.micro_batch, micro or 1), keys.accumulation, keys.sharing)
    clip = section.number("max_grad_norm", 1.0)
    if section.has("max_grad_norm"):
        work.set("train.max_grad_norm", clip or "off", (section, "max_grad_norm"))
    _set_memory_savers(work, section, keys)
    if not set_deepspeed(work, section, "deepspeed"):
        set_fsdp(work, section, "fsdp", "fsdp_config")
    elif section.has("fsdp"):
        work.leave(section, "fsdp", "DeepSpeed is named too, and counts more")
    _set_saves(work, section)
    _set_evaluation(work, section, evaluates)
    _set_logs(work, section)
    if section.has("seed"):
        work.draft.set("seed", section.whole("seed", DEFAULT_SEED, least=0), origin=section.path("seed"))


def set_name(work: Conversion, folder: str | None, origin: tuple[Section, str]) -> None:
    """Set name and output_dir, so that the run's folder is the tool's output folder."""
    path = PurePosixPath((folder or "").replace("\\", "/"))
    stem = path.name or work.reading.file.path.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:100] or "imported"
    work.draft.set(
        "name", name, origin=origin[0].path(origin[1]) if folder else (), note=_name_note(folder, stem, name)
    )
    parent = str(path.parent)
    if folder and parent != ".":
        work.draft.set("output_dir", parent, origin=origin[0].path(origin[1]))
    elif folder:
        work.draft.set("output_dir", ".", origin=origin[0].path(origin[1]))


def _name_note(folder: str | None, stem: str, name: str) -> str:
    if not folder:
        return "the file names no output folder"
    return "the run's folder is output_dir/name" + (f"; {stem} there" if stem != name else "")


def set_batches(
    work: Conversion, section: Section, micro: tuple[str, int], accumulation: str, sharing: Sequence[str] = ()
) -> None:
    """Set the global batch: micro-batch x accumulation x GPUs, of which the file does not know the last.

    Args:
        work: the conversion.
        section: where the settings are.
        micro: name and value of the micro-batch.
        accumulation: name of the micro-batches of a step.
        sharing: names of how many GPUs share a micro-batch (tensor and context parallelism).
    """
    steps = section.whole(accumulation, 1, least=1) or 1
    replicas, gpus_text = _replicas(work, _gpus_that_share(work, section, sharing))
    note = f"sequences per optimizer step over all GPUs: {micro[0]} {micro[1]} x {accumulation} {steps} x {gpus_text}"
    location = section.path(micro[0]) if section.has(micro[0]) else section.path(accumulation)
    origin = location if section.has(micro[0]) or section.has(accumulation) else ()
    work.draft.set("train.global_batch_size", micro[1] * steps * replicas, origin=origin, note=note)
    work.set("train.micro_batch_size", micro[1], (section, micro[0]))


def _gpus_that_share(work: Conversion, section: Section, keys: Sequence[str]) -> int:
    """Return how many GPUs worked on one micro-batch there."""
    sizes = [(section, key) for key in keys]
    if section.has("parallelism_config"):
        config = section.section("parallelism_config")
        sizes += [(config, key) for key in ("tp_size", "cp_size", "sp_size")]
    shared = 1
    for holder, key in sizes:
        size = holder.whole(key, 1) or 1
        if size > 1:
            shared *= size
            work.leave(holder, key, "data-parallel sharding alone is here: every GPU has micro-batches of its own")
    return shared


def _replicas(work: Conversion, shared: int) -> tuple[int, str]:
    """Return how many micro-batches were computed at a time, and how that is known."""
    gpus = work.options.gpus
    if gpus is None:
        group = "1 GPU" if shared == 1 else f"1 group of {shared} GPUs that share a micro-batch"
        return 1, f"{group}, as the file does not say how many there were: state it by --gpus N"
    if gpus % shared:
        work.reading.problem((), f"--gpus {gpus} is no multiple of the {shared} GPUs that share a micro-batch")
        return 1, ""
    sharing = f", of which {shared} share a micro-batch" if shared > 1 else ""
    return gpus // shared, f"{gpus} GPUs (--gpus){sharing}"


def _set_rates(work: Conversion, section: Section, keys: TrainerKeys) -> None:
    rate = section.number("learning_rate", keys.learning_rate_default)
    if rate is None and not section.has("learning_rate"):
        section.reading.problem(section.location, "learning_rate is missing", "add it, as in learning_rate: 2e-4")
    work.set("optim.learning_rate", rate, (section, "learning_rate"))
    decay = section.number("weight_decay", 0.0)
    if section.has("weight_decay"):
        work.set("optim.weight_decay", decay, (section, "weight_decay"))


def _set_length(work: Conversion, section: Section, keys: TrainerKeys) -> None:
    steps = section.whole("max_steps")
    if steps is not None and steps > 0:
        work.set("train.max_steps", steps, (section, "max_steps"))
        work.leave(section, keys.epochs, "max_steps counts more there, and here one of both is said")
        return
    epochs = section.number(keys.epochs, keys.epochs_default)
    work.set("train.epochs", float(epochs) if epochs is not None else None, (section, keys.epochs))


def _set_memory_savers(work: Conversion, section: Section, keys: TrainerKeys) -> None:
    _set_precision(work, section, keys)
    name = "activation_checkpointing" if section.has("activation_checkpointing") else "gradient_checkpointing"
    value = section.raw(name)
    kind = value.lower() if isinstance(value, str) else value
    if kind in ("unsloth", "offload", "offload_disk", "legacy"):
        note = f"{kind} there: the inputs of blocks stay on the GPU here"
        work.set("train.activation_checkpointing", "full", (section, name), note)
    elif kind is not None and kind not in (True, False, "true", "false"):
        section.problem(name, "must be true or false")
    elif kind is not None or keys.checkpointing_default:
        on = keys.checkpointing_default if kind is None else kind in (True, "true")
        work.set("train.activation_checkpointing", "full" if on else "off", (section, name))
    compiled = section.raw("torch_compile")
    if compiled in ("auto", True, "true"):
        work.set("train.compile", "auto" if compiled == "auto" else True, (section, "torch_compile"))


def _set_precision(work: Conversion, section: Section, keys: TrainerKeys) -> None:
    """Set [model] dtype: bfloat16 where the tool computes in 16 bits."""
    wanted = {key: section.raw(key) for key in ("bf16", "fp16", "bfloat16", "float16", "pure_bf16", "float32")}
    on = [key for key, value in wanted.items() if value in (True, "true", "auto", "full")]
    half = [key for key in on if key in ("fp16", "float16")]
    brain = [key for key in on if key in ("bf16", "bfloat16", "pure_bf16")]
    if half and not (brain and wanted[brain[0]] != "auto"):
        note = f"{half[0]} there: bfloat16 has its range without loss scaling, and fewer digits"
        work.set("model.dtype", "bfloat16", (section, half[0]), note)
        return
    bf16 = bool(brain) or (wanted["bf16"] is None and keys.bf16_default and "float32" not in on)
    if not bf16:
        work.set("model.dtype", "float32", (section, "bf16"), "no 16-bit training is asked for")
        return
    key = brain[0] if brain else "bf16"
    pure = key in ("pure_bf16", "bfloat16")
    note = "weights in bfloat16 with an fp32 master copy in the optimizer; "
    note += "no master copy there" if pure else "fp32 weights under autocast, or the like, there"
    work.set("model.dtype", "bfloat16", (section, key), note)


def _set_saves(work: Conversion, section: Section) -> None:
    strategy = section.raw("save_strategy")
    steps = section.number("save_steps")
    if strategy in ("no", False):
        work.set(
            "checkpoint.every_steps", "off", (section, "save_strategy"), "final/ is written at the end all the same"
        )
        section.raw("save_steps")
    elif strategy in ("epoch", "best"):
        work.leave(section, "save_strategy", "checkpoints are counted in steps here: set [checkpoint] every_steps")
    elif steps is not None and steps >= 1:
        work.set("checkpoint.every_steps", int(steps), (section, "save_steps"))
    elif steps:
        work.leave(section, "save_steps", "a share of all steps there: set [checkpoint] every_steps, in steps")
    kept = section.whole("save_total_limit")
    if kept is not None and kept > 0:
        note = "1 there; one alone is no safety while the next is written" if kept < 2 else ""
        work.set("checkpoint.keep", max(2, kept), (section, "save_total_limit"), note)


def _set_evaluation(work: Conversion, section: Section, evaluates: bool) -> None:
    keys = ("eval_strategy", "evaluation_strategy", "eval_steps", "early_stopping_patience", "early_stopping_steps")
    best = section.flag("load_best_model_at_end")
    if not evaluates:
        for key in (*keys, "load_best_model_at_end", "metric_for_best_model", "do_eval"):
            value = section.raw(key)
            if value not in (None, False, "no"):
                work.leave(
                    section, key, "there are no rows to evaluate on: add a [[data.eval]] source and [eval] every_steps"
                )
        return
    strategy = section.raw("eval_strategy") or section.raw("evaluation_strategy")
    every = section.number("eval_steps")
    if strategy == "epoch":
        named = "eval_strategy" if section.has("eval_strategy") else "evaluation_strategy"
        work.leave(section, named, "evaluations are counted in steps here: set [eval] every_steps")
    elif every is not None and every < 1:
        work.leave(section, "eval_steps", "a share of all steps there: set [eval] every_steps, in steps")
    elif every is not None and strategy not in ("no", False):
        work.set("eval.every_steps", int(every), (section, "eval_steps"))
    regular = work.draft.get("eval.every_steps") is not None
    for key in ("early_stopping_patience", "early_stopping_steps"):
        patience = section.whole(key)
        if patience and regular:
            work.set("eval.early_stop", patience, (section, key))
        elif patience:
            work.leave(section, key, "needs [eval] every_steps, then [eval] early_stop")
    metric = section.raw("metric_for_best_model")
    if best and regular and metric in (None, "loss", "eval_loss"):
        work.set("checkpoint.best", True, (section, "load_best_model_at_end"))
        work.set("train.load_best", True, (section, "load_best_model_at_end"))
    elif best:
        work.leave(section, "load_best_model_at_end", "needs [eval] every_steps, and eval_loss as its measure here")
    if metric not in (None, "loss", "eval_loss"):
        work.leave(section, "metric_for_best_model", "see [eval] best_by, which names a figure of [[eval.answers]]")


def _set_logs(work: Conversion, section: Section) -> None:
    every = section.number("logging_steps")
    if every is not None and every >= 1:
        work.set("log.every_steps", int(every), (section, "logging_steps"))
    elif every:
        work.leave(section, "logging_steps", "a share of all steps there: every step is logged here")
    trackers = [name for name in section.texts("report_to") if name not in ("none", "tensorboard")]
    if "wandb" in trackers or "all" in trackers:
        project = section.text("project") or "huggingface"
        work.set("log.wandb", project, (section, "report_to"), "the project's name, which is no key of the file there")
    others = [name for name in trackers if name not in ("wandb", "all")]
    if others:
        work.leave(section, "report_to", f"{', '.join(others)}: TensorBoard and Weights & Biases are what is here")


def set_order(work: Conversion, section: Section) -> None:
    """Set how rows are ordered, and whether kernels are deterministic."""
    strategy = section.raw("train_sampling_strategy")
    if strategy == "sequential":
        work.set("data.shuffle", False, (section, "train_sampling_strategy"))
    elif strategy not in (None, "random"):
        work.leave(section, "train_sampling_strategy", "rows are drawn in an order of the seed alone")
    if section.flag("full_determinism"):
        work.set("train.deterministic", True, (section, "full_determinism"))
    if section.raw("eval_on_start") is False:
        work.leave(section, "eval_on_start", "the base model is evaluated first here; [eval] at_start = false does not")
