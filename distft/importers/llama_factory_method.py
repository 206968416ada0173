"""LLaMA-Factory's ways to train: full, LoRA, freeze and OFT, and optimizers that project gradients."""

from __future__ import annotations

from distft.importers.adapters import LoraKeys, set_lora_extras, set_new_tokens, set_pissa
from distft.importers.conversion import Conversion
from distft.importers.section import Section

_LORA = LoraKeys(plus_ratio="loraplus_lr_ratio")
_KINDS = ("lora", "full", "freeze", "oft")
_FROZEN_MODULES = "trains some modules of the last blocks"
_EIGHT = "no 8-bit bases here: the base stays in 16 bits; 4 takes less memory"
_LAYERWISE = "updates in the backward pass by this optimizer are not here"


def set_method(work: Conversion, top: Section) -> None:
    """Set [method], and [model] for tokens that are added."""
    kind = top.text("finetuning_type", "lora") or "lora"
    bits = top.whole("quantization_bit")
    if kind not in _KINDS:
        top.problem("finetuning_type", "is not a method here", f"known: {', '.join(_KINDS)}")
        return
    _set_tokens(work, top)
    if kind in ("full", "freeze"):
        if bits:
            fix = "set finetuning_type: lora"
            top.problem("quantization_bit", f"{kind} fine-tuning needs a base in 16 or 32 bits", fix)
        _set_weights(work, top, kind)
        return
    if bits not in (None, 0, 4, 8):
        top.problem("quantization_bit", "bases are in 4 bits or in 16 here", "set 4")
    if bits and top.text("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        top.problem("quantization_method", "4-bit bases are bitsandbytes' here", "set bnb")
    if bits == 8:
        work.leave(top, "quantization_bit", _EIGHT)
    if kind == "oft":
        _set_oft(work, top)
    else:
        _set_lora(work, top, in_4bit=bits == 4)
    if bits == 4:
        quantised = top.text("quantization_type", "nf4", allowed=("nf4", "fp4"))
        quant = {"type": quantised, "double": top.flag("double_quantization", True)}
        work.draft.set("method.quant", quant, note="bitsandbytes' 4 bits, as there")
    _set_start(work, top)


def set_projection(work: Conversion, top: Section) -> None:
    """Set [optim] for GaLore and APOLLO, which stand beside `optim` there."""
    if top.flag("use_galore"):
        _whole_model(top, "galore", ("galore_proj_type", "std"))
        work.set("optim.name", "galore", (top, "use_galore"))
        for key, ours, default in (("galore_rank", "rank", 16), ("galore_update_interval", "update_gap", 200)):
            work.set(f"optim.{ours}", top.whole(key, default, least=1), (top, key))
        work.set("optim.scale", top.number("galore_scale", 2.0), (top, "galore_scale"))
    if top.flag("use_apollo"):
        _whole_model(top, "apollo", ("apollo_proj_type", "std"), ("apollo_proj", "random"))
        if top.flag("apollo_scale_front"):
            top.problem("apollo_scale_front", "limits the norm before it scales; here after", "remove it")
        work.set("optim.name", "apollo", (top, "use_apollo"))
        for key, ours, default in (("apollo_rank", "rank", 16), ("apollo_update_interval", "update_gap", 200)):
            work.set(f"optim.{ours}", top.whole(key, default, least=1), (top, key))
        work.set("optim.scale", top.number("apollo_scale", 32.0), (top, "apollo_scale"))
        by = top.text("apollo_scale_type", "channel", allowed=("channel", "tensor"))
        work.set("optim.scale_by", by, (top, "apollo_scale_type"))


def _whole_model(top: Section, name: str, *fixed: tuple[str, str]) -> None:
    if top.texts(f"{name}_target") not in ([], ["all"]):
        top.problem(f"{name}_target", "projects some layers; here those of all blocks are", f"set {name}_target: all")
    if top.flag(f"{name}_layerwise"):
        top.problem(f"{name}_layerwise", _LAYERWISE, "remove it")
    for key, value in fixed:
        if top.text(key, value) != value:
            top.problem(key, "is another projection, which is not here", f"set {key}: {value}")


def _set_weights(work: Conversion, top: Section, kind: str) -> None:
    """Set what is trained of the weights themselves."""
    work.set("method.name", kind, (top, "finetuning_type"))
    if kind == "full":
        return
    layers = top.whole("freeze_trainable_layers", 2) or 0
    if layers < 1:
        fix = 'name them by [method] parameters = ["regular expression"]'
        top.problem("freeze_trainable_layers", "trains blocks at the beginning", fix)
    for key, all_of_it in (("freeze_trainable_modules", ["all"]), ("freeze_extra_modules", [])):
        if top.texts(key) not in ([], all_of_it):
            top.problem(key, _FROZEN_MODULES, 'name them by [method] parameters = ["regular expression"]')
    work.set("method.last_blocks", max(layers, 1), (top, "freeze_trainable_layers"))


def _set_lora(work: Conversion, top: Section, *, in_4bit: bool) -> None:
    name = "qlora" if in_4bit else "lora"
    by = "quantization_bit" if in_4bit else "finetuning_type"
    if work.part("method", name, top, by, name):
        work.set("method.name", name, (top, by))
    rank = top.whole("lora_rank", 8, least=1) or 8
    work.set("method.r", rank, (top, "lora_rank"))
    work.set("method.alpha", top.number("lora_alpha", 2 * rank), (top, "lora_alpha"))
    work.set("method.dropout", top.number("lora_dropout", 0.0), (top, "lora_dropout"))
    _set_targets(work, top, "lora_target")
    for column, ours in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if top.flag(column):
            work.set(f"method.{ours}", True, (top, column))
    if top.has("additional_target"):
        work.set("method.modules_to_save", top.texts("additional_target"), (top, "additional_target"))
    set_lora_extras(work, top, _LORA)
    set_pissa(work, top, "pissa_init")


def _set_oft(work: Conversion, top: Section) -> None:
    work.set("method.name", "oft", (top, "finetuning_type"))
    if top.whole("oft_rank", 0):
        top.problem("oft_rank", "is the number of blocks; here their size is set", "set oft_block_size")
    work.set("method.oft_block_size", top.whole("oft_block_size", 32, least=2), (top, "oft_block_size"))
    work.set("method.module_dropout", top.number("module_dropout", 0.0), (top, "module_dropout"))
    _set_targets(work, top, "oft_target")


def _set_targets(work: Conversion, top: Section, key: str) -> None:
    targets = top.texts(key) or ["all"]
    if "all" in targets and targets != ["all"]:
        top.problem(key, "names modules beside all", "name every module, or take all and additional_target")
    note = "every linear layer but the head" if targets == ["all"] else ""
    work.set("method.target_modules", "all-linear" if targets == ["all"] else targets, (top, key), note)


def _set_start(work: Conversion, top: Section) -> None:
    """An adapter goes on; several of them, and one beside a new adapter, are merged into the base there."""
    adapters = top.texts("adapter_name_or_path")
    if len(adapters) == 1 and not top.flag("create_new_adapter"):
        note = "base, layers and ranks must be the same"
        work.set("method.start", adapters[0], (top, "adapter_name_or_path"), note)
    elif adapters:
        fix = "distft merge does it once; name the merged folder as model_name_or_path"
        top.problem("adapter_name_or_path", "is merged into the base before a new adapter begins", fix)


def _set_tokens(work: Conversion, top: Section) -> None:
    for key, ours in (("add_tokens", "add_tokens"), ("add_special_tokens", "add_special_tokens")):
        set_new_tokens(work, top, key, ours)
    if work.draft.get("model.add_tokens") or work.draft.get("model.add_special_tokens"):
        top.reading.read.add(top.path("resize_vocab"))
