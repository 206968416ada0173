"""Rows of torchtune's datasets, which functions of its own build."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distft.importers.conversion import Conversion
from distft.importers.section import Section
from distft.importers.sources import Rows, Source, add_source, data_files, set_lengths
from distft.importers.torchtune_keys import DATASET_KEYS


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """What a dataset component of torchtune's means here."""

    format: str
    source: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    trains_input: bool = False
    note: str = ""


_CHAT = "rendered by the model's chat template; torchtune writes wording of the component around the rows"
_QA = {"input": "instruction", "output": "output"}
_BUILDERS = {
    "alpaca_dataset": RowBuilder(format="alpaca", source="tatsu-lab/alpaca", trains_input=True, note=_CHAT),
    "alpaca_cleaned_dataset": RowBuilder(format="alpaca", source="yahma/alpaca-cleaned", trains_input=True, note=_CHAT),
    "instruct_dataset": RowBuilder(format="alpaca", columns=_QA, note=_CHAT),
    "grammar_dataset": RowBuilder(format="alpaca", source="liweili/c4_200m", columns=_QA, note=_CHAT),
    "samsum_dataset": RowBuilder(
        format="alpaca", source="Samsung/samsum", columns={"dialogue": "instruction", "summary": "output"}, note=_CHAT
    ),
    "chat_dataset": RowBuilder(format="messages"),
    "slimorca_dataset": RowBuilder(format="sharegpt", source="Open-Orca/SlimOrca-Dedup"),
    "text_completion_dataset": RowBuilder(format="text"),
    "wikitext_dataset": RowBuilder(
        format="text", source="EleutherAI/wikitext_document_level", columns={"page": "text"}
    ),
    "cnn_dailymail_articles_dataset": RowBuilder(
        format="text", source="ccdv/cnn_dailymail", columns={"article": "text"}
    ),
    "preference_dataset": RowBuilder(format="preference"),
    "hh_rlhf_helpful_dataset": RowBuilder(format="preference", source="RLHFlow/HH-RLHF-Helpful-standard"),
    "stack_exchange_paired_dataset": RowBuilder(
        format="preference", source="lvwerra/stack-exchange-paired",
        columns={"question": "instruction", "response_j": "chosen", "response_k": "rejected"}, note=_CHAT,
    ),
}  # fmt: skip


def component(section: Section) -> str:
    """The last part of the section's component."""
    return (section.text("_component_") or "").rpartition(".")[2]


def set_data(work: Conversion, top: Section, rows: Rows) -> None:
    """Set the sources of [data], lengths, packing, and what is trained."""
    value = top.values.get("dataset")
    sections = top.sections("dataset") if isinstance(value, list) else [top.section("dataset")]
    if not sections:
        top.problem("dataset", "holds no dataset", "add one, with a _component_")
        return
    inputs: set[bool] = set()
    packed: list[Section] = []
    for section in sections:
        _add_dataset(work, section, "train", rows, inputs)
        packed += [section] if section.flag("packed") else []
        if isinstance(value, list):
            work.settle(section, DATASET_KEYS)
    if isinstance(top.values.get("dataset_val"), dict):
        held = top.section("dataset_val")
        _add_dataset(work, held, "eval", rows, set())
        held.raw("packed")
        work.settle(held, DATASET_KEYS)
    tokenizer = top.section("tokenizer")
    tokenizer.raw("_component_")
    key = (
        (tokenizer, "max_seq_len")
        if tokenizer.has("max_seq_len") or not sections[0].has("max_seq_len")
        else (sections[0], "max_seq_len")
    )
    stated = key[0].has(key[1])
    set_lengths(
        work, key[0], key[1], 2048, rows=rows, long_rows="truncate" if stated else "error", packing=bool(packed),
        packing_of=(packed[0] if packed else sections[0], "packed"),
    )  # fmt: skip
    if not stated:
        work.draft.comments[("data", "max_length")] = ["rows of any length there: raise it until no row is refused"]
    if rows == "single":
        if len(inputs) > 1:
            top.reading.problem(
                sections[0].location, "data sets differ in train_on_input", "one [data] loss_on is for all sources"
            )
        formats = {source["format"] for source in work.draft.get("data.train") or ()}
        whole = formats == {"text"} or True in inputs
        work.set("data.loss_on", "all" if whole else "assistant", (sections[0], "train_on_input"),
                 "prompts are trained too" if True in inputs and formats != {"text"} else "")  # fmt: skip
    if top.has("shuffle") and not top.flag("shuffle"):
        work.set("data.shuffle", False, (top, "shuffle"))


def _add_dataset(
    work: Conversion, section: Section, part: Literal["train", "eval"], rows: Rows, inputs: set[bool]
) -> None:
    name = component(section)
    builder = _BUILDERS.get(name)
    if builder is None:
        section.problem(
            "_component_", "builds rows in a way that is not known", f"known: {', '.join(_BUILDERS)}"
        ) if name else (
            section.reading.problem(
                section.location, "a dataset without a _component_", f"known: {', '.join(_BUILDERS)}"
            )
        )
        return
    if (builder.format == "preference") != (rows == "pairs"):
        section.problem(
            "_component_", f"does not fit the loss, which trains on {'pairs' if rows == 'pairs' else 'single answers'}"
        )
    source = section.text("source", builder.source) or ""
    files = data_files(section, source, "source")
    if not source:
        section.reading.problem(
            section.location, "a dataset without a source", "add source: a name on the hub, or json with data_files"
        )
        return
    format, columns = builder.format, dict(builder.columns)
    if name == "chat_dataset":
        style = section.text("conversation_style", "sharegpt", allowed=("sharegpt", "openai"))
        format = "messages" if style == "openai" else "sharegpt"
        ours = "messages" if style == "openai" else "conversations"
        columns = {section.text("conversation_column", ours) or ours: ours}
    elif name == "text_completion_dataset":
        columns = {section.text("column", "text") or "text": "text"}
    columns = _mapped(section, columns, format)
    if format in ("alpaca", "messages", "sharegpt"):
        strategy = section.text("masking_strategy")
        if strategy == "train_on_last":
            section.problem(
                "masking_strategy", "trains the last answer alone", 'remove it, and write [data] loss_on = "last_turn"'
            )
        inputs.add(
            section.flag("train_on_input", builder.trains_input and strategy is None) or strategy == "train_on_all"
        )
    subset = section.text("name") or section.text("subset")
    rows_source = Source(
        path=source, format=format, subset=subset, split=section.text("split"), columns=columns, note=builder.note
    )
    add_source(work, part, rows_source, (section, "_component_"), files)


def _mapped(section: Section, columns: dict[str, str], format: str) -> dict[str, str]:
    """Columns as `column_map` (ours: theirs) renames them."""
    renames = section.section("column_map")
    roles = {"input": "instruction", "prompt": "instruction"} if format in ("alpaca", "preference") else {}
    for role in renames.values:
        column = renames.text(role)
        ours = next((ours for name, ours in columns.items() if name == role), roles.get(role, role))
        columns = {name: home for name, home in columns.items() if home != ours}
        if column is not None:
            columns[column] = ours
    return columns
