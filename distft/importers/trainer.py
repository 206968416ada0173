"""Settings of transformers' Trainer, on which Axolotl, LLaMA-Factory and TRL are built: batches, steps, precision."""

from __future__ import annotations

import re
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
    set_batches(work, section, (keys.micro_batch, micro or 1), (keys.accumulation, section.whole(keys.accumulation, 1)))
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
        work.draft.set("seed", section.whole("seed", DEFAULT_SEED, least=0), of=section.path("seed"))


def set_name(work: Conversion, folder: str | None, of: tuple[Section, str]) -> None:
    """Set name and output_dir, so that the run's folder is the tool's output folder."""
    path = PurePosixPath((folder or "").replace("\\", "/"))
    stem = path.name or work.reading.file.path.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:100] or "imported"
    work.draft.set("name", name, of=of[0].path(of[1]) if folder else (), note=_name_note(folder, stem, name))
    parent = str(path.parent)
    if folder and parent != ".":
        work.draft.set("output_dir", parent, of=of[0].path(of[1]))
    elif folder:
        work.draft.set("output_dir", ".", of=of[0].path(of[1]))


def _name_note(folder: str | None, stem: str, name: str) -> str:
    if not folder:
        return "the file names no output folder"
    return "the run's folder is output_dir/name" + (f"; {stem} there" if stem != name else "")


def set_batches(
    work: Conversion, section: Section, micro: tuple[str, int], accumulation: tuple[str, int | None], what: str = ""
) -> None:
    """Set the global batch: micro-batch x accumulation x GPUs, of which the file does not know the last."""
    steps, gpus = accumulation[1] or 1, work.options.gpus
    gpu_note = (
        f"{gpus} GPUs (--gpus)" if gpus else "1 GPU, as the file does not say how many there were: state it by --gpus N"
    )
    note = f"sequences per optimizer step over all GPUs: {micro[0]} {micro[1]} x {accumulation[0]} {steps} x {gpu_note}"
    path = section.path(micro[0]) if section.has(micro[0]) else section.path(accumulation[0])
    origin = path if section.has(micro[0]) or section.has(accumulation[0]) else ()
    total = micro[1] * steps * (gpus or 1)
    work.draft.set("train.global_batch_size", total, of=origin, note="; ".join(filter(None, (note, what))))
    work.set("train.micro_batch_size", micro[1], (section, micro[0]))


def _set_rates(work: Conversion, section: Section, keys: TrainerKeys) -> None:
    rate = section.number("learning_rate", keys.learning_rate_default)
    if rate is None and not section.has("learning_rate"):
        section.reading.problem(section.key_path, "learning_rate is missing", "add it, as in learning_rate: 2e-4")
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
