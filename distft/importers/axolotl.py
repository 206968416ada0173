"""Axolotl's YAML."""

from __future__ import annotations

import re

from distft.importers.adapters import LoraKeys, set_lora_extras, set_new_tokens
from distft.importers.axolotl_keys import AXOLOTL_KEYS, DATASET_KEYS
from distft.importers.axolotl_rows import set_data
from distft.importers.config_file import ConfigFile
from distft.importers.conversion import Conversion
from distft.importers.objectives import (
    PreferenceKeys,
    dpo_loss,
    set_dpo,
    set_orpo,
    set_reward,
    set_simpo,
    set_unpaired,
)
from distft.importers.optimizers import ScheduleKeys
from distft.importers.section import Section
from distft.importers.sources import Rows
from distft.importers.spec import ImporterSpec
from distft.importers.trainer import TrainerKeys, set_name, set_training

_WARMUP = "at most 100 steps there"
_TRAINER = TrainerKeys(
    micro_batch="micro_batch_size",
    micro_batch_default=1,
    epochs="num_epochs",
    epochs_default=1.0,
    optimizer="optimizer",
    learning_rate_default=None,
    schedule=ScheduleKeys(name="lr_scheduler", default="cosine", default_ratio=0.03, default_note=_WARMUP),
    sharing=("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"),
    bf16_default=True,
)
_PREFERENCE = PreferenceKeys(
    beta="rl_beta",
    label_smoothing="dpo_label_smoothing",
    desirable="kto_desirable_weight",
    undesirable="kto_undesirable_weight",
)


_LORA = LoraKeys(
    plus_ratio="loraplus_lr_ratio",
    target_parameters="lora_target_parameters",
    layers="peft_layers_to_transform",
    init="peft_init_lora_weights",
    start="lora_model_dir",
)


def _detects(file: ConfigFile) -> bool:
    return "base_model" in file.content


def _convert(work: Conversion) -> None:
    top = work.top()
    rows = _set_objective(work, top)
    if rows is None:
        return
    set_name(work, top.text("output_dir", "./model-out"), (top, "output_dir"))
    _set_model(work, top)
    _set_method(work, top)
    set_data(work, top, rows)
    _set_batch_size(top)
    set_training(work, top, _TRAINER, evaluates=work.draft.get("data.eval") is not None)
    if (ratio := top.number("cosine_min_lr_ratio")) is not None:
        work.set("schedule.min_ratio", ratio, (top, "cosine_min_lr_ratio"))
    project = top.text("wandb_project") if top.has("wandb_project") else None
    if project and top.raw("use_wandb") is not False and top.raw("wandb_mode") != "disabled":
        work.set("log.wandb", project, (top, "wandb_project"))


def _set_objective(work: Conversion, top: Section) -> Rows | None:
    """Set [objective]; return what a row is made of, None for what is not trained here."""
    kind = (top.text("rl") or "").lower()
    if not kind and top.flag("reward_model"):
        set_reward(work, top, "reward_model")
        return "pairs"
    if top.flag("process_reward_model"):
        top.problem("process_reward_model", AXOLOTL_KEYS["process_reward_model"].text)
    if top.has("dpo_beta") and not top.has("rl_beta"):
        beta = PreferenceKeys(**{**vars(_PREFERENCE), "beta": "dpo_beta"})
    else:
        beta = _PREFERENCE
    if kind in ("dpo", "ipo"):
        loss = "ipo" if kind == "ipo" else dpo_loss(work, top, "dpo_loss_type", "dpo_loss_weights")
        set_dpo(work, top, "rl", loss, beta)
    elif kind == "orpo":
        set_orpo(work, top, "rl", PreferenceKeys(beta="orpo_alpha" if top.has("orpo_alpha") else beta.beta))
    elif kind == "simpo":
        set_simpo(work, top, "rl", beta, likelihood=True)
    elif kind == "kto":
        set_unpaired(work, top, "rl", "kto", "kto", beta)
        return "unpaired"
    elif kind:
        known = "known: dpo, ipo, orpo, simpo, kto"
        by_hand = 'its rewards are programs: write [objective] name = "grpo" and [rollout] by hand (distft recipes)'
        top.problem("rl", "is not imported", by_hand if kind == "grpo" else known)
        return None
    return "pairs" if kind else "single"


def _set_model(work: Conversion, top: Section) -> None:
    path = top.text("base_model")
    if path is None and not top.has("base_model"):
        top.reading.problem((), "base_model is missing", "add it: a folder, or a name on the hub")
    work.set("model.path", path, (top, "base_model"))
    for key in ("revision_of_model", "model_revision"):
        if top.has(key):
            work.set("model.revision", top.text(key), (top, key))
    if top.has("tokenizer_config") and top.text("tokenizer_config") != path:
        work.set("model.tokenizer", top.text("tokenizer_config"), (top, "tokenizer_config"))
    set_new_tokens(work, top, "tokens", "add_tokens")
    named = top.raw("attn_implementation") if top.has("attn_implementation") else None
    if top.flag("eager_attention") or named == "eager":
        work.set("model.attention", "eager", (top, "eager_attention" if named is None else "attn_implementation"))
    elif named:
        work.leave(
            top, "attn_implementation", 'attention = "auto" takes flash-attn where it is installed; the same numbers'
        )


def _set_method(work: Conversion, top: Section) -> None:
    adapter = top.text("adapter")
    four, eight = top.flag("load_in_4bit"), top.flag("load_in_8bit")
    quant = _four_bits(work, top)
    if adapter is None:
        _set_weights(work, top)
        if four or eight:
            key = "load_in_4bit" if four else "load_in_8bit"
            top.problem(key, "trains no weights: full fine-tuning needs a base in 16 or 32 bits", "set adapter: qlora")
        return
    if adapter not in ("lora", "qlora"):
        top.problem("adapter", "is not imported", "known: lora, qlora, or none of them for full fine-tuning")
        return
    name = "qlora" if adapter == "qlora" or four or quant else "lora"
    if work.part("method", name, top, "adapter", name):
        work.set("method.name", name, (top, "adapter"), "" if name == adapter else "load_in_4bit is set")
    if adapter == "qlora" and eight:
        top.problem("load_in_8bit", "qlora has its base in 4 bits", "set load_in_4bit: true")
    elif eight:
        work.leave(
            top, "load_in_8bit", "no 8-bit bases here: the base stays in 16 bits; load_in_4bit takes less memory"
        )
    if not top.has("lora_r"):
        top.reading.problem((), "lora_r is missing", "add it: Axolotl has no default either")
    work.set("method.r", top.whole("lora_r", 8, least=1), (top, "lora_r"))
    work.set("method.alpha", top.number("lora_alpha", 8), (top, "lora_alpha"))
    work.set("method.dropout", top.number("lora_dropout", 0.0), (top, "lora_dropout"))
    _set_targets(work, top)
    for tool_key, ours in (("peft_use_rslora", "rslora"), ("peft_use_dora", "dora")):
        if top.flag(tool_key):
            work.set(f"method.{ours}", True, (top, tool_key))
    if top.has("lora_modules_to_save"):
        work.set("method.modules_to_save", top.texts("lora_modules_to_save"), (top, "lora_modules_to_save"))
    set_lora_extras(work, top, _LORA)
    if name == "qlora":
        work.draft.set("method.quant", {"type": "nf4", "double": True, **quant}, note="bitsandbytes' 4 bits, as there")


def _set_weights(work: Conversion, top: Section) -> None:
    """Set what is trained of the weights themselves: all, or those whose names begin as a pattern says."""
    patterns = top.texts("unfrozen_parameters")
    if not patterns:
        work.draft.set("method.name", "full", note="no adapter there")
        return
    rows = [pattern for pattern in patterns if re.search(r"\[\d*:\d*\]$", pattern)]
    if rows:
        fix = "name whole parameters, or the tokens in [method] trainable_tokens of lora"
        top.problem("unfrozen_parameters", f"trains some rows of a parameter: {rows[0]}", fix)
    whole = [pattern if pattern.endswith("$") else f"(?:{pattern}).*" for pattern in patterns]
    work.draft.set("method.name", "freeze", note="unfrozen_parameters")
    work.set("method.parameters", whole, (top, "unfrozen_parameters"), "expressions that fit whole names here")


_QUANT = {
    "bnb_4bit_quant_type": "type",
    "bnb_4bit_use_double_quant": "double",
}


def _four_bits(work: Conversion, top: Section) -> dict[str, object]:
    """Return the settings of [method] quant that the file has."""
    quant: dict[str, object] = {}
    kwargs = top.section("bnb_config_kwargs")
    for tool_key, ours in _QUANT.items():
        if kwargs.has(tool_key):
            quant[ours] = kwargs.text(tool_key) if ours == "type" else kwargs.flag(tool_key)
    for key in kwargs.values:
        if key not in _QUANT:
            work.leave(kwargs, key, "types of the 4-bit base follow [model] dtype")
    peft = top.section("peft")
    backend, dtype = peft.text("backend"), peft.text("weight_dtype")
    if backend == "bnb" and dtype == "nf4":
        quant["type"] = "nf4"
    elif dtype is not None:
        peft.problem("weight_dtype", f"bases in {dtype} of {backend} are not trained here", "take backend: bnb and nf4")
    for key in peft.values:
        if key not in ("backend", "weight_dtype") and peft.has(key):
            peft.problem(key, "changes the adapter or its base, and nothing here does", "remove it")
    return quant


def _set_targets(work: Conversion, top: Section) -> None:
    linear = top.flag("lora_target_linear")
    value = top.raw("lora_target_modules")
    named = value if isinstance(value, str) and "," not in value else top.texts("lora_target_modules")
    if linear:
        work.set("method.target_modules", "all-linear", (top, "lora_target_linear"), "every linear layer but the head")
        beyond = [name for name in ([named] if isinstance(named, str) else named) if not name.endswith("_proj")]
        if beyond:
            top.problem(
                "lora_target_modules",
                f"names {', '.join(beyond)} beside lora_target_linear, which may be no linear layer of a block",
                "name every module in lora_target_modules, and set lora_target_linear: false",
            )
    elif named:
        all_of_them = named in ("all-linear", ["all-linear"], "all_linear")
        work.set("method.target_modules", "all-linear" if all_of_them else named, (top, "lora_target_modules"))
    else:
        top.reading.problem(
            (), "an adapter with neither lora_target_linear nor lora_target_modules", "set lora_target_linear: true"
        )


def _set_batch_size(top: Section) -> None:
    """Axolotl's `batch_size` is of one GPU: micro-batch x accumulation."""
    if not top.has("batch_size"):
        return
    total, micro = top.whole("batch_size", 1, least=1) or 1, top.whole("micro_batch_size", 1, least=1) or 1
    if top.has("gradient_accumulation_steps"):
        top.problem("batch_size", "says the same as gradient_accumulation_steps", "keep one of them")
    elif total % micro:
        top.problem("batch_size", f"is no multiple of micro_batch_size = {micro}")
    else:
        top.values["gradient_accumulation_steps"] = total // micro


SPEC = ImporterSpec(
    name="axolotl",
    title="Axolotl",
    told_by="a key base_model at the top",
    detects=_detects,
    convert=_convert,
    keys={"": AXOLOTL_KEYS, "datasets[]": DATASET_KEYS},
)
