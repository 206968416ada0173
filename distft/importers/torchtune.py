"""torchtune's YAML: sections with a `_component_` each."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from distft.importers.config_file import ConfigFile
from distft.importers.conversion import Conversion
from distft.importers.objectives import SIMPO
from distft.importers.section import Section
from distft.importers.sources import Rows
from distft.importers.spec import ImporterSpec
from distft.importers.torchtune_keys import LOGGER_KEYS, SECTIONS
from distft.importers.torchtune_rows import component, set_data
from distft.importers.trainer import DEFAULT_SEED, set_batches, set_name

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


_SFT_LOSSES = (
    "CEWithChunkedOutputLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "CrossEntropyWithChunkedOutputLoss",
)
_OPTIMIZERS = {
    "AdamW": ("adamw", 0.01, ""),
    "Adam": ("adamw", 0.0, "Adam there: without weight decay the same as AdamW"),
    "AdamW8bit": ("adamw_8bit", 0.01, ""),
    "PagedAdamW": ("paged_adamw_32bit", 0.01, ""),
    "PagedAdamW32bit": ("paged_adamw_32bit", 0.01, ""),
    "PagedAdamW8bit": ("paged_adamw_8bit", 0.01, ""),
}
"""Class -> name here, weight decay where it is not set, and what is different."""


def _detects(file: ConfigFile) -> bool:
    return any(name == "_component_" for name in file.nested_keys())


def _convert(work: Conversion) -> None:
    _resolve(work)
    top = work.top()
    rows = _set_objective(work, top)
    set_name(work, top.text("output_dir"), (top, "output_dir"))
    _set_model(work, top)
    set_data(work, top, rows)
    _set_optimizer(work, top)
    _set_training(work, top)
    for name, table in SECTIONS.items():
        if name and isinstance(top.values.get(name), dict):
            work.settle(top.section(name), table)


def _resolve(work: Conversion) -> None:
    """Put values in place of `${output_dir}`."""
    file = work.reading.file

    def resolved(value: Any, location: tuple[str | int, ...], depth: int = 0) -> Any:
        if isinstance(value, dict):
            return {key: resolved(inner, (*location, str(key))) for key, inner in value.items()}
        if isinstance(value, list):
            return [resolved(inner, (*location, place)) for place, inner in enumerate(value)]
        reference = _REFERENCE.search(value) if isinstance(value, str) else None
        if reference is None:
            return value
        target: Any = file.content
        for step in reference[1].split("."):
            target = target.get(step) if isinstance(target, dict) else None
        if target is None or isinstance(target, dict | list) or depth > 8:
            work.reading.problem(location, f"{reference[0]} names no value of the file", "write the value itself")
            return None
        if reference[0] == value:
            return resolved(target, location, depth + 1)
        return resolved(value.replace(reference[0], str(target)), location, depth + 1)

    work.reading.file = replace(file, content=resolved(file.content, ()))


def _set_objective(work: Conversion, top: Section) -> Rows:
    loss = top.section("loss")
    name = component(loss)
    if name in _SFT_LOSSES or not name:
        work.set("objective.name", "sft", (loss, "_component_"))
        return "single"
    if name in ("DPOLoss", "RSOLoss"):
        if not work.part("objective", "dpo", loss, "_component_", "DPO"):
            return "pairs"
        work.set("objective.name", "dpo", (loss, "_component_"))
        key = "beta" if name == "DPOLoss" else "gamma"
        note = "" if name == "DPOLoss" else "gamma there"
        work.set("objective.beta", loss.number(key, 0.1), (loss, key), note)
        if name == "RSOLoss":
            work.set("objective.loss", "hinge", (loss, "_component_"), "RSOLoss there")
        smoothing = loss.number("label_smoothing")
        if smoothing:
            work.set("objective.label_smoothing", smoothing, (loss, "label_smoothing"))
    elif name == "SimPOLoss":
        if not work.part("objective", "simpo", loss, "_component_", "SimPO"):
            return "pairs"
        work.set("objective.name", "simpo", (loss, "_component_"))
        work.set("objective.beta", loss.number("beta", 2.0), (loss, "beta"))
        work.set("objective.gamma", loss.number("gamma", 0.5), (loss, "gamma"), SIMPO)
        if loss.number("label_smoothing"):
            loss.problem("label_smoothing", "simpo has no label smoothing here: another loss", "remove it")
    elif name == "IPOLoss":
        fix = 'take DPOLoss, or write [objective] loss = "ipo" yourself with another beta'
        loss.problem("_component_", "takes the sum of an answer's tokens; ipo here takes their mean", fix)
    else:
        losses = ", ".join((*_SFT_LOSSES, "DPOLoss", "RSOLoss", "SimPOLoss"))
        loss.problem("_component_", "is a loss that is not here", f"known: {losses}")
    return "pairs"


_MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}


def _set_model(work: Conversion, top: Section) -> None:
    loader, model = top.section("checkpointer"), top.section("model")
    folder = loader.text("checkpoint_dir")
    if folder is None:
        location = loader.location if top.has("checkpointer") else ()
        fix = "add it: the folder of the model in the hub's layout"
        top.reading.problem(location, "checkpointer.checkpoint_dir is missing", fix)
    work.set("model.path", folder, (loader, "checkpoint_dir"))
    if loader.has("keep_last_n_checkpoints"):
        kept = loader.whole("keep_last_n_checkpoints", 2, least=1) or 2
        work.set("checkpoint.keep", max(2, kept), (loader, "keep_last_n_checkpoints"))
    kind = top.text("dtype", "bf16")
    if kind in ("bf16", "fp32"):
        note = "with an fp32 master copy in the optimizer, which is not there" if kind == "bf16" else ""
        work.set("model.dtype", "bfloat16" if kind == "bf16" else "float32", (top, "dtype"), note)
    else:
        top.problem("dtype", "is not trained in here", "known: bf16, fp32")
    name = component(model)
    if not name:
        top.reading.problem(
            (), "model has no _component_", "add the builder, as torchtune.models.llama3_1.lora_llama3_1_8b"
        )
    if any(word in name for word in ("vision", "flamingo", "clip", "early_fusion", "classifier", "reward")):
        model.problem("_component_", "is no text model that is trained here")
    quantized = name.startswith("qlora") or model.flag("quantize_base")
    if not quantized and not name.startswith("lora"):
        work.set("method.name", "full", (model, "_component_"))
        return
    if name.startswith("qat"):
        model.problem("_component_", "quantisation-aware training is not here", "take the lora_ builder")
    work.set("method.name", "qlora" if quantized else "lora", (model, "_component_"))
    work.set("method.r", model.whole("lora_rank", 8, least=1), (model, "lora_rank"))
    work.set("method.alpha", model.number("lora_alpha", 16), (model, "lora_alpha"))
    work.set("method.dropout", model.number("lora_dropout", 0.0), (model, "lora_dropout"))
    named = model.texts("lora_attn_modules")
    for module in named:
        if module not in _MODULES:
            model.problem("lora_attn_modules", f"{module} is not known", f"known: {', '.join(_MODULES)}")
    targets = [_MODULES.get(module, module) for module in named]
    targets += ["gate_proj", "up_proj", "down_proj"] if model.flag("apply_lora_to_mlp") else []
    targets += ["lm_head"] if model.flag("apply_lora_to_output") else []
    work.set(
        "method.target_modules",
        targets,
        (model, "lora_attn_modules"),
        "names of transformers' Llama: output_proj is o_proj",
    )
    if model.flag("use_dora"):
        work.set("method.dora", True, (model, "use_dora"))
    if quantized:
        work.draft.set("method.quant", {"type": "nf4", "double": True}, note="bitsandbytes' NF4; torchao's there")


def _set_optimizer(work: Conversion, top: Section) -> None:
    section = top.section("optimizer")
    name = component(section)
    if name not in _OPTIMIZERS:
        optimizers = ", ".join(_OPTIMIZERS)
        section.reading.problem(
            section.path("_component_")
            if section.has("_component_")
            else section.location
            if top.has("optimizer")
            else (),
            "is not an optimizer here, and another one would train another model"
            if name
            else "optimizer has no _component_",
            f"known: {optimizers}",
        )
    here, decay, note = _OPTIMIZERS.get(name, ("adamw", 0.01, ""))
    work.set("optim.name", here, (section, "_component_"), note)
    rate = section.number("lr")
    if rate is None and not section.has("lr"):
        section.reading.problem(
            section.location if top.has("optimizer") else (), "optimizer.lr is missing", "add it, as in lr: 2e-5"
        )
    work.set("optim.learning_rate", rate, (section, "lr"))
    note = "norms and biases are left out here, and decayed there"
    work.set(
        "optim.weight_decay", section.number("weight_decay", decay), (section, "weight_decay"), note if decay else ""
    )
    betas = section.raw("betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(beta, float) for beta in betas):
            section.problem("betas", "must be two numbers below 1, as [0.9, 0.95]")
        else:
            work.set("optim.betas", betas, (section, "betas"))
    work.set("optim.eps", section.number("eps"), (section, "eps"))
    _set_schedule(work, top)


def _set_schedule(work: Conversion, top: Section) -> None:
    section = top.section("lr_scheduler")
    name = component(section)
    if not name:
        work.draft.set("schedule.name", "constant", note="no lr_scheduler there")
        return
    if name != "get_cosine_schedule_with_warmup":
        section.problem(
            "_component_", "is a schedule that is not here", "known: get_cosine_schedule_with_warmup, or none"
        )
        return
    if section.number("num_cycles", 0.5) != 0.5:
        section.problem("num_cycles", "gives another curve than cosine has here, once from the peak to the end")
    work.set("schedule.name", "cosine", (section, "_component_"))
    work.set("schedule.warmup_steps", section.whole("num_warmup_steps", least=0), (section, "num_warmup_steps"))


def _set_training(work: Conversion, top: Section) -> None:
    micro = top.whole("batch_size", 1, least=1) or 1
    shared = ("tensor_parallel_dim", "context_parallel_dim")
    set_batches(work, top, ("batch_size", micro), "gradient_accumulation_steps", shared)
    epochs, most = top.whole("epochs", 1, least=1) or 1, top.whole("max_steps_per_epoch")
    if most:
        note = f"max_steps_per_epoch {most} x epochs {epochs}" if epochs > 1 else "of one epoch"
        work.set("train.max_steps", most * epochs, (top, "max_steps_per_epoch"), note)
    else:
        work.set("train.epochs", float(epochs), (top, "epochs"))
    clip = top.number("clip_grad_norm")
    work.set("train.max_grad_norm", clip or "off", (top, "clip_grad_norm"))
    recomputes = top.flag("enable_activation_checkpointing")
    mode = top.text("ac_mode")
    level = "selective" if mode == "selective" else "full" if recomputes or mode == "full" else "off"
    work.set(
        "train.activation_checkpointing", level, (top, "enable_activation_checkpointing" if mode is None else "ac_mode")
    )
    if top.flag("compile"):
        work.set("train.compile", True, (top, "compile"))
    if top.flag("cudnn_deterministic_mode"):
        work.set("train.deterministic", True, (top, "cudnn_deterministic_mode"))
    for key, setting, value in (("fsdp_cpu_offload", "offload", "all"),):
        if top.flag(key):
            work.set("engine.name", "fsdp2", (top, key))
            work.set(f"engine.{setting}", value, (top, key))
    if top.raw("fsdp_reshard_after_forward") is False:
        work.set("engine.name", "fsdp2", (top, "fsdp_reshard_after_forward"))
        work.set("engine.gather", "once_a_step", (top, "fsdp_reshard_after_forward"))
    _set_steps(work, top)
    if top.has("seed"):
        work.draft.set("seed", top.whole("seed", DEFAULT_SEED, least=0), origin=top.path("seed"))
    else:
        work.draft.set("seed", DEFAULT_SEED, note="drawn by chance there")


def _set_steps(work: Conversion, top: Section) -> None:
    work.set("log.every_steps", top.whole("log_every_n_steps", least=1), (top, "log_every_n_steps"))
    work.set("checkpoint.every_steps", top.whole("save_every_n_steps", least=1), (top, "save_every_n_steps"))
    every = top.whole("run_val_every_n_steps", least=1)
    if work.draft.get("data.eval") is not None:
        work.set("eval.every_steps", every, (top, "run_val_every_n_steps"))
    elif every:
        work.leave(top, "run_val_every_n_steps", "there are no rows to evaluate on: add a [[data.eval]] source")
    logger = top.section("metric_logger")
    if component(logger) == "WandBLogger":
        work.set("log.wandb", logger.text("project", "torchtune"), (logger, "project"))
    else:
        work.leave(logger, "_component_", LOGGER_KEYS["_component_"].text)


SPEC = ImporterSpec(
    name="torchtune",
    title="torchtune",
    told_by="sections with a key _component_",
    detects=_detects,
    convert=_convert,
    keys=SECTIONS,
)
