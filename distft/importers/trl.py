"""The YAML of TRL's command line, `trl sft --config FILE`. The file does not say which command it is for."""

from __future__ import annotations

from distft.importers.adapters import LoraKeys, set_lora_extras
from distft.importers.config_file import ConfigFile
from distft.importers.conversion import Conversion
from distft.importers.objectives import (
    PreferenceKeys,
    dpo_loss,
    set_cpo,
    set_dpo,
    set_orpo,
    set_reward,
    set_simpo,
    set_unpaired,
)
from distft.importers.section import Section
from distft.importers.sources import Rows, Source, add_source, data_files, set_lengths
from distft.importers.spec import ImporterSpec
from distft.importers.trainer import TrainerKeys, set_name, set_order, set_training
from distft.importers.trl_keys import TRL_DATASET_KEYS, TRL_KEYS
from distft.importers.trl_mixtures import MIXED_KEYS, MIXTURE_KEYS, set_mixture
from distft.importers.trl_rollouts import set_group_length, set_prompt_batches, set_rollouts

TASKS = ("sft", "dpo", "kto", "bco", "orpo", "cpo", "reward", "grpo")
_PREFERENCE = PreferenceKeys(beta="beta")
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "bco": 5e-7, "orpo": 1e-6, "cpo": 1e-6, "reward": 1e-4, "grpo": 1e-6}
"""Learning rates where the file has none."""
_ONLY = {
    "sft": ("packing", "dataset_text_field", "assistant_only_loss", "completion_only_loss", "packing_strategy"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "reward": ("center_rewards_coefficient",),
    "grpo": ("reward_funcs", "num_generations", "num_iterations", "scale_rewards", "epsilon"),
    "dpo": (
        "rpo_alpha",
        "f_divergence_type",
        "sync_ref_model",
        "reference_free",
        "loss_weights",
    ),
}
"""Keys that only one command has."""
_SHARED = (
    "beta", "loss_type", "label_smoothing", "precompute_ref_log_probs", "max_prompt_length", "max_completion_length",
)  # fmt: skip
"""Keys that several commands on preferences have."""
_ONLY_LOSSES = {
    "sft": ("nll", "chunked_nll", "dft"),
    "dpo": ("robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot"),
    "cpo": ("simpo", "alphapo"),
    "kto": ("kto", "apo_zero_unpaired"),
}
"""Values of loss_type that only one command has."""
_MARKS = {
    "dataset_name", "use_peft", "lora_r", "max_length", "assistant_only_loss", "completion_only_loss", "beta",
    "dataset_mixture", "dataset_mixer", "loss_type", "dataset_text_field", "dataset_train_split", "dataset_config",
    "max_seq_length", "reward_funcs",
}  # fmt: skip


def _detects(file: ConfigFile) -> bool:
    content = file.content
    datasets = isinstance(content.get("datasets"), list) and "base_model" not in content  # which Axolotl has too
    return "model_name_or_path" in content and (bool(content.keys() & _MARKS) or datasets)


def _convert(work: Conversion) -> None:
    top = work.top()
    task = _task(work, top)
    if task is None:
        return
    rows = _set_objective(work, top, task)
    set_name(work, top.text("output_dir"), (top, "output_dir"))
    _set_model(work, top)
    _set_method(work, top)
    evaluates = _set_sources(work, top, task)
    if rows == "prompts":
        set_group_length(work, top)
    else:
        _set_lengths(work, top, rows)
    if rows == "single":
        _set_mask(work, top)
    template = top.text("chat_template_path") if top.has("chat_template_path") else None
    if template and template.endswith(".jinja"):
        work.set("data.chat_template", template, (top, "chat_template_path"))
    elif template:
        work.set("model.tokenizer", template, (top, "chat_template_path"), "its chat template was taken there, alone")
    trainer = TrainerKeys(learning_rate_default=_RATES[task], bf16_default=True, checkpointing_default=True)
    set_training(work, top, trainer, evaluates=evaluates)
    if task == "grpo":
        set_prompt_batches(work, top)
    set_order(work, top)
    _set_dtype(work, top)


def _task(work: Conversion, top: Section) -> str | None:
    """Return which command the file is for: as --task says, else by the keys that one command alone has."""
    task = work.options.task
    if task is not None:
        if task not in TASKS:
            top.reading.problem((), f"--task {task} has no importer", f"known: {', '.join(TASKS)}")
            return None
        return task
    tasks = [task for task, keys in _ONLY.items() if any(top.has(key) for key in keys)]
    loss = top.values.get("loss_type")
    tasks += [task for task, losses in _ONLY_LOSSES.items() if loss in losses and task not in tasks]
    if len(tasks) == 1:
        work.draft.comment("objective.name", f"read from the keys of the file: trl {tasks[0]}")
        return tasks[0]
    shared = [key for key in _SHARED if top.has(key)]
    if not tasks and not shared:
        work.draft.comment(
            "objective.name", "the file does not say which command it is for: trl sft is assumed; --task says it"
        )
        return "sft"
    by = (
        f"has keys of {' and of '.join(tasks)}"
        if tasks
        else f"has {', '.join(shared)}, which dpo, orpo, cpo and others share"
    )
    location = top.path(shared[0]) if shared else ()
    top.reading.problem(
        location, f"the file {by}: it is not clear which command it is for", f"say --task: {', '.join(TASKS)}"
    )
    return None


def _set_objective(work: Conversion, top: Section, task: str) -> Rows:
    kind = top.raw("loss_type")
    loss = kind if isinstance(kind, str) else None
    if task == "sft":
        if loss not in (None, "nll", "chunked_nll"):
            top.problem("loss_type", "is another loss, which is not here", "nll is what sft trains")
        work.draft.set("objective.name", "sft")
        return "single"
    if task == "grpo":
        set_rollouts(work, top)
        return "prompts"
    if task == "dpo":
        set_dpo(work, top, "loss_type", dpo_loss(work, top, "loss_type", "loss_weights"), _PREFERENCE)
    elif task == "orpo":
        set_orpo(work, top, "beta", _PREFERENCE)
    elif task == "reward":
        set_reward(work, top, "center_rewards_coefficient")
    elif task == "cpo" and loss == "simpo":
        set_simpo(work, top, "loss_type", _PREFERENCE, likelihood=True)
    elif task == "cpo":
        if loss not in (None, "sigmoid"):
            top.problem("loss_type", "is not a loss of cpo here", "known: sigmoid, simpo")
        set_cpo(work, top, "loss_type", _PREFERENCE)
    else:
        set_unpaired(work, top, "loss_type", task, loss or "kto", _PREFERENCE)
        return "unpaired"
    return "pairs"


def _set_model(work: Conversion, top: Section) -> None:
    path = top.text("model_name_or_path")
    work.set("model.path", path, (top, "model_name_or_path"))
    if top.raw("model_revision") not in (None, "main"):
        work.set("model.revision", top.text("model_revision"), (top, "model_revision"))
    kernel = top.raw("attn_implementation")
    if kernel == "eager":
        work.set("model.attention", "eager", (top, "attn_implementation"))
    elif kernel is not None:
        work.leave(
            top, "attn_implementation", 'attention = "auto" takes flash-attn where it is installed; the same numbers'
        )


_LORA = LoraKeys(target_parameters="lora_target_parameters")


def _set_dtype(work: Conversion, top: Section) -> None:
    """The type of the weights counts more than that of autocast where it is said."""
    for key in ("dtype", "torch_dtype"):
        dtype = top.text(key, allowed=("auto", "bfloat16", "float16", "float32")) if top.has(key) else None
        if dtype == "float16":
            work.set("model.dtype", "bfloat16", (top, key), "float16 there")
        elif dtype == "bfloat16":
            work.draft.comments.pop(("model", "dtype"), None)
            work.set("model.dtype", dtype, (top, key), "with an fp32 master copy in the optimizer, which is not there")


def _set_method(work: Conversion, top: Section) -> None:
    four, eight = top.flag("load_in_4bit"), top.flag("load_in_8bit")
    if not top.flag("use_peft"):
        work.set("method.name", "full", (top, "use_peft"))
        if four or eight:
            key = "load_in_4bit" if four else "load_in_8bit"
            top.problem(key, "full fine-tuning needs a base in 16 or 32 bits", "set use_peft: true")
        return
    name = "qlora" if four else "lora"
    by = "load_in_4bit" if four else "use_peft"
    if work.part("method", name, top, by, name):
        work.set("method.name", name, (top, by))
    if eight:
        work.leave(
            top, "load_in_8bit", "no 8-bit bases here: the base stays in 16 bits; load_in_4bit takes less memory"
        )
    work.set("method.r", top.whole("lora_r", 16, least=1), (top, "lora_r"))
    work.set("method.alpha", top.number("lora_alpha", 32), (top, "lora_alpha"))
    work.set("method.dropout", top.number("lora_dropout", 0.05), (top, "lora_dropout"))
    targets = top.texts("lora_target_modules")
    if targets in ([], ["all-linear"]):
        note = "" if targets else "PEFT chooses by the model's name there, often q_proj and v_proj alone"
        work.set("method.target_modules", "all-linear", (top, "lora_target_modules"), note)
    else:
        work.set("method.target_modules", targets, (top, "lora_target_modules"))
    if top.has("lora_modules_to_save"):
        work.set("method.modules_to_save", top.texts("lora_modules_to_save"), (top, "lora_modules_to_save"))
    set_lora_extras(work, top, _LORA)
    for tool_key, ours in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if top.flag(tool_key):
            work.set(f"method.{ours}", True, (top, tool_key))
    if four:
        kind = top.text("bnb_4bit_quant_type", "nf4", allowed=("nf4", "fp4"))
        quant = {"type": kind, "double": top.flag("use_bnb_nested_quant")}
        work.draft.set("method.quant", quant, note="bitsandbytes' 4 bits, as there")


def _set_sources(work: Conversion, top: Section, task: str) -> bool:
    """Set the sources; return whether there is one to evaluate on."""
    format = {"sft": "auto", "kto": "unpaired", "bco": "unpaired", "grpo": "prompt"}.get(task, "preference")
    columns: dict[str, str] = {}
    if task == "sft" and top.has("dataset_text_field"):
        format, columns = "text", {top.text("dataset_text_field") or "text": "text"}
    for section in top.sections("datasets"):
        path = section.text("path") or ""
        files = data_files(section, path, "path")
        source = Source(
            path=path, format=format, subset=section.text("name"), split=section.text("split"), columns=columns
        )
        add_source(work, "train", source, (section, "path"), files)
        work.settle(section, TRL_DATASET_KEYS)
    set_mixture(work, top, format, columns)
    name = top.text("dataset_name")
    if name is not None and not top.has("datasets"):
        _set_named(work, top, name, format, columns)
    elif work.draft.get("data.train") is None:
        top.reading.problem((), "there is no dataset", "add dataset_name, datasets, dataset_mixture or dataset_mixer")
    return work.draft.get("data.eval") is not None


def _set_named(work: Conversion, top: Section, name: str, format: str, columns: dict[str, str]) -> None:
    train = Source(
        path=name, format=format, subset=top.text("dataset_config"),
        split=top.text("dataset_train_split", "train"), columns=columns,
    )  # fmt: skip
    add_source(work, "train", train, (top, "dataset_name"))
    if top.values.get("eval_strategy") in (None, "no", False) or format == "prompt":  # [[eval.answers]] asks prompts
        return
    held = Source(
        path=name, format=format, subset=top.text("dataset_config"),
        split=top.text("dataset_test_split", "test"), columns=columns,
    )  # fmt: skip
    add_source(work, "eval", held, (top, "dataset_test_split" if top.has("dataset_test_split") else "dataset_name"))


def _set_lengths(work: Conversion, top: Section, rows: Rows) -> None:
    key = "max_seq_length" if top.has("max_seq_length") and not top.has("max_length") else "max_length"
    packing = top.flag("packing")
    if top.text("truncation_mode", "keep_start") == "keep_end" and rows == "single":
        top.problem("truncation_mode", "keeps the ends of long rows; their beginnings are kept here", "set keep_start")
    set_lengths(work, top, key, 1024, rows=rows, long_rows="truncate", packing=packing, packing_of=(top, "packing"))
    if packing and top.text("packing_strategy") == "wrapped":
        work.draft.comment("data.packing", "wrapped there: documents were cut where a sequence ended")


def _set_mask(work: Conversion, top: Section) -> None:
    completion = top.raw("completion_only_loss")
    if work.draft.get("data.train.0.format") == "text":
        work.draft.set("data.loss_on", "all")
    elif top.flag("assistant_only_loss"):
        work.set("data.loss_on", "assistant", (top, "assistant_only_loss"))
    elif completion is True:
        work.set("data.loss_on", "completion", (top, "completion_only_loss"))
    else:
        note = (
            "TRL trains whole chats and texts; of rows with a prompt and a completion the completion alone: then write "
        )
        note += '"completion"' if completion is None else ""
        reason = note if completion is None else "prompts are trained too"
        work.set("data.loss_on", "all", (top, "completion_only_loss"), reason)


SPEC = ImporterSpec(
    name="trl",
    title="TRL",
    told_by="model_name_or_path with dataset_name (or a list of datasets), use_peft, max_length or packing",
    detects=_detects,
    convert=_convert,
    keys={
        "": TRL_KEYS,
        "datasets[]": TRL_DATASET_KEYS,
        "dataset_mixture": MIXTURE_KEYS,
        "dataset_mixture.datasets[]": MIXED_KEYS,
    },
)
