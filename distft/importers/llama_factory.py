"""LLaMA-Factory's YAML, and its dataset_info.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from distft.core.errors import RecipeError
from distft.importers.config_file import ConfigFile, read_json
from distft.importers.conversion import Conversion
from distft.importers.llama_factory_keys import INFO_KEYS, LLAMA_FACTORY_KEYS
from distft.importers.llama_factory_method import set_method, set_projection
from distft.importers.objectives import PreferenceKeys, set_dpo, set_orpo, set_reward, set_simpo, set_unpaired
from distft.importers.section import Section
from distft.importers.sources import Rows, Source, add_source, set_lengths, set_template
from distft.importers.spec import ImporterSpec
from distft.importers.trainer import TrainerKeys, set_name, set_order, set_training

_TRAINER = TrainerKeys(optimizer_default="adamw_torch", checkpointing_default=True)
_PREFERENCE = PreferenceKeys(
    beta="pref_beta",
    label_smoothing="dpo_label_smoothing",
    sft_weight="pref_ftx",
    desirable="kto_chosen_weight",
    undesirable="kto_rejected_weight",
)
_STAGES = ("pt", "sft", "rm", "dpo", "kto")
_MARKS = (
    "stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "lora_target", "lora_rank", "pref_beta",
    "quantization_bit",
)  # fmt: skip
_ALPACA = "rendered by the chat template; input follows instruction after a blank line, after a line break there"
_OWN = "a template of LLaMA-Factory's own code there"


def _detects(file: ConfigFile) -> bool:
    names = file.content.keys() & set(_MARKS)
    return "model_name_or_path" in file.content and bool(names)


def _convert(work: Conversion) -> None:
    top = work.top()
    stage = top.text("stage", "sft") or "sft"
    if stage not in _STAGES:
        top.problem("stage", "is not trained here", f"known: {', '.join(_STAGES)}")
    if top.raw("do_train") is False:
        top.problem("do_train", "a file of another command: it does not train")
    rows = _set_objective(work, top, stage)
    set_name(work, top.text("output_dir"), (top, "output_dir"))
    _set_model(work, top)
    set_method(work, top)
    _set_data(work, top, stage, rows)
    if top.flag("disable_gradient_checkpointing"):
        top.values["gradient_checkpointing"] = False
    set_training(work, top, _TRAINER, evaluates=work.draft.get("data.eval") is not None)
    set_projection(work, top)
    set_order(work, top)
    if top.flag("disable_shuffling"):
        work.set("data.shuffle", False, (top, "disable_shuffling"))


def _set_objective(work: Conversion, top: Section, stage: str) -> Rows:
    if stage == "rm":
        set_reward(work, top, "stage")
        return "pairs"
    if stage == "kto":
        set_unpaired(work, top, "stage", "kto", "kto", _PREFERENCE)
        return "unpaired"
    if stage != "dpo":
        return "single"
    loss = top.text("pref_loss", "sigmoid") or "sigmoid"
    by = "pref_loss" if top.has("pref_loss") else "stage"
    if loss == "orpo":
        set_orpo(work, top, by, _PREFERENCE)
    elif loss == "simpo":
        set_simpo(work, top, by, _PREFERENCE, likelihood=False)
    else:
        set_dpo(work, top, by, loss, _PREFERENCE)
    return "pairs"


def _set_model(work: Conversion, top: Section) -> None:
    work.set("model.path", top.text("model_name_or_path"), (top, "model_name_or_path"))
    if top.raw("model_revision") not in (None, "main"):
        work.set("model.revision", top.text("model_revision"), (top, "model_revision"))
    kernel = top.raw("flash_attn") if top.has("flash_attn") else None
    if kernel in ("disabled", False, "off"):
        work.set("model.attention", "eager", (top, "flash_attn"))
    elif kernel not in (None, "auto"):
        work.leave(top, "flash_attn", 'attention = "auto" takes flash-attn where it is installed; the same numbers')
    if top.flag("train_from_scratch"):
        work.set("model.init", "random", (top, "train_from_scratch"))


def _set_data(work: Conversion, top: Section, stage: str, rows: Rows) -> None:
    folder = top.text("dataset_dir", "data") or "data"
    for key, part in (("dataset", "train"), ("eval_dataset", "eval")):
        names = top.texts(key)
        info = _read_info(work, top, key, folder) if names else None
        for name in names if info else ():
            _add_dataset(work, top, key, name, info or (Path(), {}), part, stage, rows)  # type: ignore[arg-type]
    if not top.texts("dataset"):
        top.reading.problem((), "there is no dataset", "add dataset: with names of dataset_info.json")
    if top.text("mix_strategy", "concat") != "concat":
        top.problem("mix_strategy", "draws sources by chance", "write [[data.train]] share or weight instead")
    packing = top.flag("packing", stage == "pt") or top.flag("neat_packing")
    key = "neat_packing" if top.flag("neat_packing") else "packing"
    set_lengths(
        work, top, "cutoff_len", 2048, rows=rows, long_rows="drop" if packing else "truncate", packing=packing,
        packing_of=(top, key),
    )  # fmt: skip
    if packing and rows == "single" and not top.flag("neat_packing") and stage != "pt":
        work.draft.comment("data.packing", "packing without neat_packing lets documents attend to each other there")
    if not packing and rows == "single":
        work.draft.comment("data.long_rows", "the end is cut here; prompt and answer are each cut in proportion there")
    if rows == "single":
        _set_mask(work, top, stage)
    set_template(
        work, top, "template", same=("llama3",), tokenizer_names=("default",), there=_OWN if top.has("template") else ""
    )


def _set_mask(work: Conversion, top: Section, stage: str) -> None:
    if stage == "pt":
        work.draft.set("data.loss_on", "all")
    elif top.flag("mask_history"):
        work.set("data.loss_on", "last_turn", (top, "mask_history"))
    else:
        whole = top.flag("train_on_prompt")
        note = "prompts are trained too" if whole else "every answer, no prompt"
        work.set("data.loss_on", "all" if whole else "assistant", (top, "train_on_prompt"), note)


def _read_info(work: Conversion, top: Section, key: str, folder: str) -> tuple[Path, dict[str, object]] | None:
    """Return the folder of dataset_info.json and its entries; the file's own folder is looked into too."""
    here = work.reading.file.path.parent
    places = [Path(folder), here / folder, here, *(parent / folder for parent in here.resolve().parents[:3])]
    info_folder = next((place for place in places if (place / "dataset_info.json").is_file()), None)
    if info_folder is None:
        top.problem(
            key,
            f"names data sets of dataset_info.json, which is neither in {folder} nor beside the file",
            "put dataset_info.json there, or set dataset_dir to its folder",
        )
        return None
    try:
        return info_folder, read_json(info_folder / "dataset_info.json")
    except RecipeError as error:
        top.problem(key, f"{info_folder / 'dataset_info.json'}: {error.problems[0].message}")
        return None


def _add_dataset(
    work: Conversion,
    top: Section,
    key: str,
    name: str,
    info: tuple[Path, dict[str, object]],
    part: Literal["train", "eval"],
    stage: str,
    rows: Rows,
) -> None:
    folder, entries = info
    entry = entries.get(name)
    if not isinstance(entry, dict):
        names = ", ".join(list(entries)[:20])
        top.problem(key, f"{name} is not in {folder / 'dataset_info.json'}", f"it has: {names}")
        return
    unknown = [setting for setting in entry if setting not in INFO_KEYS]
    for setting in unknown:
        top.problem(key, f"dataset_info.json: {name} has {setting}, which is not known to this importer", "remove it")
    for setting in entry:
        if setting in INFO_KEYS and INFO_KEYS[setting].fate == "refused":
            top.problem(key, f"dataset_info.json: {setting} of {name}: {INFO_KEYS[setting].text}")
    path = _path(folder, entry)
    if path is None:
        top.problem(key, f"dataset_info.json: {name} names no file and no data set of Hugging Face's hub")
        return
    shape = _shape(top, key, name, entry, stage, rows)
    if shape is None:
        return
    most = [count for count in (entry.get("num_samples"), top.whole("max_samples", least=1)) if isinstance(count, int)]
    source = Source(
        path=path,
        format=shape[0],
        subset=_word(entry, "subset"),
        split=_word(entry, "split"),
        max_rows=min(most) if most else None,
        columns=shape[1],
        note=shape[2],
    )
    add_source(work, part, source, (top, key))


def _word(entry: dict[str, object], key: str) -> str | None:
    value = entry.get(key)
    return value if isinstance(value, str) else None


def _path(folder: Path, entry: dict[str, object]) -> str | None:
    if hub := _word(entry, "hf_hub_url"):
        return hub
    if name := _word(entry, "file_name"):
        return (folder / name).as_posix()
    return None


_MEDIA = ("images", "videos", "audios")


def _shape(
    top: Section, key: str, name: str, entry: dict[str, object], stage: str, rows: Rows
) -> tuple[str, dict[str, str], str] | None:
    """Return format, columns and what is to be where of the rows of an entry."""
    columns = entry.get("columns") if isinstance(entry.get("columns"), dict) else {}
    named: dict[str, str] = {str(ours): str(column) for ours, column in (columns or {}).items() if column}  # type: ignore[union-attr]
    where = f"dataset_info.json: {name}"
    if media := [column for column in _MEDIA if column in named]:
        top.problem(key, f"{where} has {', '.join(media)}, which are not trained on here")
        return None
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        top.problem(key, f"{where}: formatting {formatting} is not known", "known: alpaca, sharegpt, openai")
        return None
    pairs, unpaired = bool(entry.get("ranking")), "kto_tag" in named
    kind: Rows = "pairs" if pairs else "unpaired" if unpaired else "single"
    if kind != rows:
        kinds = {"pairs": "pairs (ranking: true)", "unpaired": "answers with a kto_tag", "single": "single answers"}
        top.problem(key, f"{where} holds {kinds[kind]}; stage {stage} trains on {kinds[rows]}")
        return None
    if stage == "pt":
        return "text", {named.get("prompt", "instruction" if not named else "text"): "text"}, ""
    if formatting == "alpaca":
        return _alpaca(named, rows)
    return _turns(top, key, where, entry, named, rows, str(formatting))


def _alpaca(named: dict[str, str], rows: Rows) -> tuple[str, dict[str, str], str]:
    ours = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    if rows == "unpaired":
        ours["kto_tag"] = "label"
    ours |= {"chosen": "chosen", "rejected": "rejected"} if rows == "pairs" else {}
    mapping = {column: ours[name] for name, column in named.items() if name in ours}
    return {"single": "alpaca", "pairs": "preference", "unpaired": "unpaired"}[rows], mapping, _ALPACA


_KNOWN_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}


def _turns(
    top: Section, key: str, where: str, entry: dict[str, object], named: dict[str, str], rows: Rows, formatting: str
) -> tuple[str, dict[str, str], str] | None:
    tags = entry.get("tags") if isinstance(entry.get("tags"), dict) else {}
    words: dict[str, object] = dict(tags or {})  # type: ignore[arg-type]
    default = ("role", "content") if formatting == "openai" else ("from", "value")
    turn = (words.get("role_tag", default[0]), words.get("content_tag", default[1]))
    for tag, word in words.items():
        if tag in _KNOWN_TAGS and word not in _KNOWN_TAGS[tag]:
            top.problem(
                key,
                f"{where}: {tag} {word} is not known",
                f"known: {', '.join(_KNOWN_TAGS[tag])}; rename it in the rows",
            )
            return None
    if turn not in (("from", "value"), ("role", "content")):
        top.problem(key, f"{where}: turns have {turn[0]} and {turn[1]}", "rename them in the rows to role and content")
        return None
    column = named.get("messages", "messages" if formatting == "openai" else "conversations")
    chats = "messages" if turn[0] == "role" else "conversations"
    if rows == "pairs":
        chats = "prompt" if turn[0] == "role" else "conversations"
    mapping = {column: chats}
    mapping |= {named[name]: name for name in ("system", "tools") if name in named}
    if rows == "pairs":
        mapping |= {named[name]: name for name in ("chosen", "rejected") if name in named}
    if rows == "unpaired":
        mapping[named["kto_tag"]] = "label"
    formats = {"single": "messages" if turn[0] == "role" else "sharegpt", "pairs": "preference", "unpaired": "unpaired"}
    return formats[rows], mapping, ""


SPEC = ImporterSpec(
    name="llama_factory",
    title="LLaMA-Factory",
    told_by="model_name_or_path with stage, finetuning_type, template or cutoff_len",
    detects=_detects,
    convert=_convert,
    keys={"": LLAMA_FACTORY_KEYS, "dataset_info.json": INFO_KEYS},
)
