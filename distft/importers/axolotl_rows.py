"""Rows of Axolotl's datasets: what each `type` means, what they are called, and what of them is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from distft.importers.axolotl_keys import DATASET_KEYS
from distft.importers.conversion import Conversion
from distft.importers.section import Section
from distft.importers.sources import Rows, Source, add_source, data_files, set_lengths, set_template

_CHAT = "rendered by the chat template"
_NO_TEMPLATE = (
    "the tokenizer's own, where there was Alpaca's wording: a base model that has none needs plain, chatml, llama3 "
    "or a .jinja file here"
)
_ALPACA = "rendered by the chat template; Axolotl writes Alpaca's own wording around instruction and input"


@dataclass(frozen=True, kw_only=True)
class RowType:
    """What a `type` of Axolotl's means here."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    note: str = ""


_ORCA = {"system_prompt": "system", "question": "instruction", "response": "output"}
_SINGLE = {
    "alpaca": RowType(format="alpaca", note=_ALPACA),
    "alpaca_w_system": RowType(format="alpaca", note=_ALPACA),
    "alpaca_w_system.load_open_orca": RowType(format="alpaca", columns=_ORCA, note=_ALPACA),
    "alpaca_w_system.load_open_orca_chatml": RowType(format="alpaca", columns=_ORCA),
    "alpaca_chat": RowType(format="alpaca", note=_ALPACA),
    "alpaca_chat.load_qa": RowType(
        format="alpaca", columns={"question": "instruction", "answer": "output"}, note=_ALPACA
    ),
    "alpaca_chat.load_concise": RowType(format="alpaca", note=_ALPACA),
    "alpaca_chat.load_camel_ai": RowType(
        format="alpaca", columns={"message_1": "instruction", "message_2": "output"}, note=_ALPACA
    ),
    "gpteacher": RowType(format="alpaca", columns={"response": "output"}, note=_ALPACA),
    "oasst": RowType(format="alpaca", columns={"INSTRUCTION": "instruction", "RESPONSE": "output"}, note=_ALPACA),
    "summarizetldr": RowType(format="alpaca", columns={"article": "instruction", "summary": "output"}, note=_ALPACA),
    "completion": RowType(format="text", note="a text longer than max_length is cut into several rows there"),
    "pretrain": RowType(format="text", note="texts are strung together there; here each is a document of its own"),
    "chat_template": RowType(format="messages"),
    "sharegpt": RowType(format="sharegpt"),
}
_QUESTION = {"question": "instruction"}
_PAIRS = {
    "": RowType(format="preference"),
    "chat_template": RowType(format="preference"),
    "chat_template.default": RowType(format="preference"),
    "chat_template.argilla": RowType(format="preference"),
    "chat_template.argilla_chat": RowType(format="preference"),
    "argilla": RowType(format="preference"),
    "argilla_chat": RowType(format="preference"),
    "intel": RowType(format="preference", columns=_QUESTION, note=_CHAT),
    "icr": RowType(format="preference", columns={"input": "instruction"}, note=_CHAT),
    "prompt_pairs": RowType(format="preference", columns={"prompt": "instruction"}, note=_CHAT),
    "ultra": RowType(format="preference", note=_CHAT),
    "passthrough": RowType(format="preference"),
    "user_defined": RowType(format="preference", note="prompt and answers are raw text"),
    "user_defined.default": RowType(format="preference", note="prompt and answers are raw text"),
    "bradley_terry.chat_template": RowType(format="preference", columns={"input": "instruction"}),
}
_JUDGED = {"prompt": "instruction", "completion": "output"}
_OLD_ARGILLA = {"chosen_response": "chosen", "rejected_response": "rejected"}
_UNPAIRED = {
    "": RowType(format="unpaired"),
    "user_defined": RowType(format="unpaired", note="prompt and answer are raw text"),
    "user_defined.default": RowType(format="unpaired", note="prompt and answer are raw text"),
    "argilla": RowType(format="unpaired", columns={"completion": "output"}, note=_CHAT),
    "argilla_chat": RowType(format="unpaired", columns={"completion": "messages"}, note=_CHAT),
    "intel": RowType(format="unpaired", columns={**_QUESTION, "completion": "output"}, note=_CHAT),
    "prompt_pairs": RowType(format="unpaired", columns=_JUDGED, note=_CHAT),
    "ultra": RowType(format="unpaired", columns=_JUDGED, note=_CHAT),
}
_TEMPLATES = ("chatml", "llama3", "zephyr")
"""Ways in which types of pairs are written: `chatml.intel` is `intel` in ChatML."""


def set_data(work: Conversion, top: Section, rows: Rows) -> None:
    """Set the sources of [data], lengths, packing, template, and what is trained."""
    for key in ("datasets", "pretraining_dataset"):
        value = top.raw(key)
        if isinstance(value, str):
            add_source(work, "train", Source(path=value, format="text", note=_SINGLE["pretrain"].note), (top, key))
        else:
            for section in top.sections(key):
                _add_dataset(work, section, "train", rows, default="pretrain" if key == "pretraining_dataset" else "")
    for section in top.sections("test_datasets"):
        _add_dataset(work, section, "eval", rows, default="")
    if not top.has("datasets") and not top.has("pretraining_dataset"):
        top.reading.problem((), "there are no datasets", "add datasets: with a path and a type")
    long_rows = _long_rows(top)
    pretrains = top.has("pretraining_dataset")
    packing = top.flag("sample_packing", pretrains)
    origin = (top, "sample_packing")
    set_lengths(work, top, "sequence_len", 512, rows=rows, long_rows=long_rows, packing=packing, packing_of=origin)
    if rows == "single":
        _set_mask(work, top)
    tokenizer_names = ("tokenizer_default", "tokenizer")
    if top.has("chat_template_jinja"):
        path = top.text("chat_template_jinja") or ""
        if path.endswith(".jinja"):
            top.raw("chat_template")
            work.set("data.chat_template", path, (top, "chat_template_jinja"))
        else:
            top.problem(
                "chat_template_jinja", "is a template inside the file", "write it to a .jinja file and name that"
            )
    else:
        set_template(work, top, "chat_template", same=("chatml", "llama3"), tokenizer_names=tokenizer_names)
    if any(source["format"] == "alpaca" for source in work.draft.get("data.train") or ()) and not work.draft.get(
        "data.chat_template"
    ):
        work.draft.set("data.chat_template", "auto", note=_NO_TEMPLATE)
    if top.raw("shuffle_merged_datasets") is False or top.flag("curriculum_sampling"):
        key = "curriculum_sampling" if top.flag("curriculum_sampling") else "shuffle_merged_datasets"
        work.set("data.shuffle", False, (top, key), "rows in the order of their files" if key[0] == "c" else "")


def _long_rows(top: Section) -> Literal["drop", "truncate", "error"]:
    allowed = {"drop": "drop", "truncate": "truncate", "raise": "error", "error": "error"}
    named = top.text("excess_length_strategy", "drop", allowed=tuple(allowed))
    return allowed[named or "drop"]  # type: ignore[return-value]


def _set_mask(work: Conversion, top: Section) -> None:
    """Set [data] loss_on; text is trained whole."""
    formats = {source["format"] for source in work.draft.get("data.train") or ()}
    if formats == {"text"}:
        top.raw("train_on_inputs")
        work.draft.set("data.loss_on", "all")
    else:
        whole = top.flag("train_on_inputs")
        note = "prompts are trained too" if whole else "prompts are masked"
        work.set("data.loss_on", "all" if whole else "assistant", (top, "train_on_inputs"), note)


def _add_dataset(work: Conversion, section: Section, part: Literal["train", "eval"], rows: Rows, default: str) -> None:
    origin = (section, "path")
    path = section.text("path")
    kind = _row_type(work, section, rows, default)
    if path is None:
        if not section.has("path"):
            section.reading.problem(section.location, "a dataset without a path", "add its path")
        return
    files = data_files(section, path, "path")
    if kind is not None:
        split = section.text("split") or section.text("train_on_split")
        source = Source(
            path=path,
            format=kind.format,
            subset=section.text("name"),
            split=split,
            columns=kind.columns,
            note=kind.note,
        )
        add_source(work, part, source, origin, files)
    _settle_dataset(work, section)


def _settle_dataset(work: Conversion, section: Section) -> None:
    """Read the keys that say which parts are trained, and account for the rest."""
    if section.has("roles_to_train"):
        roles = section.texts("roles_to_train")
        if not roles or not set(roles) <= {"assistant", "gpt", "model"}:
            fix = "remove it, or mark turns by weight 0 in the rows"
            section.problem("roles_to_train", "trains other turns than the assistant's", fix)
    if section.text("train_on_eos") not in (None, "turn"):
        section.problem("train_on_eos", "trains other ends of turns than those of trained turns", "remove it")
    if section.text("message_field_training") not in (None, "train", "weight"):
        section.problem(
            "message_field_training", 'turns are marked by "train" or "weight" here', "rename it in the rows"
        )
    if section.has("train_on_inputs"):
        work.leave(section, "train_on_inputs", "[data] loss_on is one for all sources")
    if section.has("chat_template") and work.draft.get("data.chat_template") is None:
        set_template(work, section, "chat_template", same=("chatml", "llama3"), tokenizer_names=("tokenizer_default",))
    elif section.has("chat_template"):
        work.leave(section, "chat_template", "one template renders all sources: that of [data] chat_template")
    work.settle(section, DATASET_KEYS)


def _row_type(work: Conversion, section: Section, rows: Rows, default: str) -> RowType | None:
    value = section.raw("type")
    if isinstance(value, dict):
        return _own_type(section.section("type"), rows)
    name = section.text("type", default) or ""
    if rows == "single":
        row_type = _SINGLE.get(name) or _SINGLE.get(name.partition(":")[0]) or _SINGLE.get(name.split(".")[0])
        if row_type is None:
            section.problem("type" if name else "path", "has no type that is known", f"known: {', '.join(_SINGLE)}")
        elif row_type.format in ("messages", "sharegpt"):
            return _chat(section, row_type)
        elif row_type.format == "text":
            column = section.text("field") or section.text("text_column") or "text"
            return RowType(format="text", columns={column: "text"}, note=row_type.note)
        return row_type
    style, _, rest = name.partition(".")
    if style in _TEMPLATES:
        name = rest
        if style in work.registries.templates and not work.top().has("chat_template"):
            work.set("data.chat_template", style, (section, "type"))
    if rows == "unpaired":
        row_type = _UNPAIRED.get(name)
        if row_type is None:
            section.problem("type", "is no form of judged answers that is known", f"known: {_listed(_UNPAIRED)}")
        return row_type
    row_type = _PAIRS.get(name)
    if name == "argilla" and style in _TEMPLATES:
        return RowType(format="preference", columns=_OLD_ARGILLA, note=_CHAT)
    if row_type is None:
        section.problem("type", "is no form of pairs that is known", f"known: {_listed(_PAIRS)}")
        return None
    names = {"field_messages": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    columns = {section.text(tool_key) or ours: ours for tool_key, ours in names.items() if section.has(tool_key)}
    _mapping(section)
    return RowType(format="preference", columns={**row_type.columns, **columns}, note=row_type.note)


def _listed(types: Mapping[str, RowType]) -> str:
    return ", ".join(filter(None, types))


def _chat(section: Section, row_type: RowType) -> RowType | None:
    """Return the type of chats, by what their turns and their column are called."""
    turn = _mapping(section)
    if row_type.format == "sharegpt" or turn == ("from", "value"):
        format, column = "sharegpt", "conversations"
    elif turn == ("role", "content"):
        format, column = "messages", "messages"
    else:
        key = "message_property_mappings" if section.has("message_property_mappings") else "message_field_role"
        section.problem(key, f"turns have {turn[0]} and {turn[1]}", "rename them in the rows to role and content")
        return None
    default = "messages" if row_type.format == "messages" else column
    columns = {section.text("field_messages", default) or default: column}
    if section.has("field_tools"):
        columns[section.text("field_tools") or "tools"] = "tools"
    return RowType(format=format, columns=columns)


def _mapping(section: Section) -> tuple[str, str]:
    """What turns call their role and their content."""
    mapping = section.section("message_property_mappings")
    role = mapping.text("role") or section.text("message_field_role") or "role"
    content = mapping.text("content") or section.text("message_field_content") or "content"
    others: Sequence[str] = [key for key in mapping.values if key not in ("role", "content") and mapping.has(key)]
    for key in others:
        if mapping.text(key) != key:
            mapping.problem(key, "is renamed in every turn, which is not done here", "rename it in the rows")
    return role, content


_OWN_COLUMNS = {
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}


def _own_type(section: Section, rows: Rows) -> RowType | None:
    """A type that the file defines: names of columns, and wording around them, which is the template's here."""
    columns = {section.text(tool_key) or ours: ours for tool_key, ours in _OWN_COLUMNS.items() if section.has(tool_key)}
    wording = [key for key in section.values if key not in _OWN_COLUMNS and section.has(key)]
    for key in wording:
        if key == "system_prompt":
            section.problem(key, "is written into every row there", "put it into the rows, as a column system")
        else:
            section.raw(key)
    note = f"rendered by the chat template; {', '.join(wording)} there: write a .jinja file for the same text"
    kinds = {"single": "alpaca", "pairs": "preference", "unpaired": "unpaired"}
    return RowType(format=kinds[rows], columns=columns, note=note if wording else "")
