"""final/README.md: the model card, with the metadata the Hugging Face hub reads, from the run folder's own facts.

Written when final/ is, and again whenever there is more to say: after an evaluation, with the report.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.evaluation.judged import SIDES, judged_warnings
from distft.run_exports import exports_of, how_to_run
from distft.run_record import RunRecord, number

CARD = "README.md"
YOURS = "<!-- distft writes what is above anew; what is below is yours -->"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FEW_ROWS = 100
_BOILERPLATE = "# Model Card for Model ID"
"""The form, not filled in, that PEFT leaves."""


def refresh(run: RunRecord) -> Path | None:
    """Write the card of a run that has a final/; a card that people replaced by their own is left alone."""
    folder = run.folder / "final"
    path = folder / CARD
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else YOURS
        if YOURS not in text and _BOILERPLATE not in text:
            return None
    return write(folder, run)


def write(folder: Path, run: RunRecord) -> Path | None:
    """Write the card into `folder`, keeping what people wrote below the line; None: it cannot be written."""
    path, below = folder / CARD, "\n"
    with contextlib.suppress(OSError):
        below = path.read_text(encoding="utf-8", errors="replace").partition(YOURS)[2] or "\n"
    with contextlib.suppress(OSError):
        path.write_text(card(run, folder) + YOURS + below, encoding="utf-8")
        return path
    return None


def card(run: RunRecord, folder: Path, *, run_section: Sequence[str] | None = None) -> str:
    """Return the text; `folder` holds the model and its tokenizer.

    `run_section`: lines that stand instead of how final/ is used, for a folder that was exported from it.
    """
    parts = (
        _metadata(run),
        _what(run),
        _scores(run),
        [*_use(run, folder), *how_to_run(exports_of(run.folder))] if run_section is None else run_section,
        _trained(run),
        _data(run),
        _limits(run),
        _again(run),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


# -- metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata ------------------------------------


def _metadata(run: RunRecord) -> Iterator[str]:
    yield "---"
    yield f"library_name: {'peft' if run.is_adapter else 'transformers'}"
    yield f"pipeline_tag: {'text-classification' if _is_reward_model(run) else 'text-generation'}"
    if _is_hub_id(run):
        yield f"base_model: {_yaml(run.base)}"
        yield f"base_model_relation: {'adapter' if run.is_adapter else 'finetune'}"
    if licence := _licence(run):
        yield f"license: {_yaml(licence)}"
    hub = [
        source["path"] for source in _sources(run, "train") if _HUB_ID.fullmatch(source["path"]) and not _here(source)
    ]
    if hub:
        yield from ("datasets:", *(f"- {_yaml(path)}" for path in dict.fromkeys(hub)))
    tags = ["distft", run.table("objective").get("name", ""), run.method]
    yield from ("tags:", *(f"- {_yaml(tag)}" for tag in tags if tag))
    yield from _index(run)
    yield from ("---", "")


def _index(run: RunRecord) -> Iterator[str]:
    measured = [
        (result, value) for result in run.results if (value := number((result.tuned or {}).get("value"))) is not None
    ]
    if not measured:
        return
    yield from ("model-index:", f"- name: {_yaml(run.name)}", "  results:")
    for name in dict.fromkeys(result.name for result, _ in measured):
        yield "  - task:"
        yield "      type: text-generation"
        yield "    dataset:"
        yield f"      name: {_yaml(name)}"
        yield f"      type: {_yaml(name)}"
        yield "    metrics:"
        for result, value in measured:
            if result.name == name:
                yield f"    - type: {_yaml(result.figure)}"
                yield f"      value: {value:.6g}"
                yield f"      name: {_yaml(result.title)}"


def _is_reward_model(run: RunRecord) -> bool:
    """Whether final/ has a head that gives a number, and so generates no text."""
    return run.objective_spec is not None and run.objective_spec.head == "scalar"


def _is_hub_id(run: RunRecord) -> bool:
    """Return whether the base is a hub id; a path of that form may be a folder, which the manifest tells."""
    folder = (run.manifest.get("model") or {}).get("folder", run.base)
    return bool(_HUB_ID.fullmatch(run.base)) and str(folder) != run.base and not Path(run.base).exists()


def _here(source: dict[str, Any]) -> bool:
    return Path(source["path"]).suffix != "" or Path(source["path"]).exists()


def _licence(run: RunRecord) -> str:
    """Return the base model's licence, where its own card names one."""
    folder = (run.manifest.get("model") or {}).get("folder")
    if not folder:
        return ""
    with contextlib.suppress(OSError):
        text = (Path(folder) / CARD).read_text(encoding="utf-8", errors="replace")
        head = text.split("---")[1] if text.startswith("---") else ""
        if match := re.search(r"^license:\s*[\"']?([\w.+-]+)", head, re.MULTILINE):
            return match[1]
    return ""


# -- text ---------------------------------------------------------------------------------------------------------


def _what(run: RunRecord) -> Iterator[str]:
    how = run.method_title or "Fine-tuning"
    if run.table("method").get("quant") is not None:
        how += " (adapters beside a 4-bit base)"
    yield f"# {_plain(run.name)}"
    yield ""
    yield f"{how} of `{_code(run.base)}` with distft."
    yield ""


def _scores(run: RunRecord) -> Iterator[str]:
    before, after = run.held_out_losses
    state = f", of step {run.best.get('step')}, the best one" if run.final_label == "best" else ""
    if not run.results and after is None:
        yield from ("## Evaluation", "", "None was made: nothing here says that it is better than its base.", "")
        return
    yield from (
        "## Evaluation",
        "",
        "| rows | score | before | after | change | verdict |",
        "|---|---|---:|---:|---:|---|",
    )
    for result in run.results:
        change = result.change or {}
        cells = (result.name, result.title, _interval(result.before), _interval(result.tuned),
                 _interval(change.get("difference")), result.verdict)  # fmt: skip
        yield f"| {' | '.join(map(_plain, cells))} |"
    if after is not None:
        change = "" if before is None else f"{after - before:+.4g}"
        yield f"| held-out rows | loss | {'' if before is None else f'{before:.4g}'} | {after:.4g} | {change} | |"
    yield from _judged(run)
    yield ""
    if run.results:
        counts = [number((result.before or result.tuned or {}).get("num_rows")) for result in run.results]
        rows = sorted({int(count) for count in counts if count is not None})
        row_counts = ", ".join(map(str, rows))
        yield f"Before: the base model, on the same rows ({row_counts}); after: the state that is here{state}."
    if run.results or any(run.judged):
        yield "In brackets 95 % intervals over rows."
        yield ""


def _judged(run: RunRecord) -> Iterator[str]:
    """Rows of the table, of held-out rows that judge answers."""
    before, after = run.judged
    if after is None:
        return
    rows = "held-out pairs" if after["kind"] == "pairs" else "held-out labelled answers"
    good = SIDES[after["kind"]][0]
    for title, path in (
        ("accuracy", ("accuracy",)),
        ("reward margin", ("margin",)),
        ("calibration error", ("calibration", "error")),
        (f"log-probability per token, {good} answers", ("logprob_per_token", good)),
    ):
        was, now = (_measured(figures, path) for figures in (before, after))
        if now:
            yield f"| {rows} | {title} | {_plain(was)} | {_plain(now)} | | |"


def _measured(figures: Any, path: tuple[str, ...]) -> str:
    for key in path:
        figures = (figures or {}).get(key)
    return _interval(figures if isinstance(figures, Mapping) or figures is None else {"value": figures})


def _interval(measured: Any) -> str:
    value = None if not measured else number(measured.get("value"))
    if value is None:
        return ""
    low, high = number(measured.get("low")), number(measured.get("high"))
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _use(run: RunRecord, folder: Path) -> Iterator[str]:
    chat = (folder / "chat_template.jinja").is_file()
    where = f"{run.folder / 'final'}"
    yield from ("## Use", "", "```python")
    own = "" if run.method_spec is None else run.method_spec.loader
    load = (own or (_WITH_PEFT if run.is_adapter else _PLAIN)).format(folder=json.dumps(where))
    if _is_reward_model(run):
        load = load.replace("ForCausalLM", "ForSequenceClassification").replace("dtype=", "num_labels=1, dtype=")
    asks = (_CHAT_REWARD if chat else _TEXT_REWARD) if _is_reward_model(run) else (_CHAT if chat else _TEXT)
    yield from load.splitlines()
    yield from asks.format(prompt=json.dumps(_prompt(run), ensure_ascii=False)).splitlines()
    yield from ("```", "")
    if _is_reward_model(run):
        yield "The reward is read at the last token, the end of the answer. Rewards compare answers to one prompt."
        yield ""
    if deploy := run.table("method").get("deploy"):
        yield f"It was trained as `{_plain(str(deploy))}` rounds it: export it so. Unrounded it is another model."
        yield ""
    if run.is_adapter:
        yield f"The adapter needs its base, `{_code(run.base)}`, which adapter_config.json names."
        yield ""


_PLAIN = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}  # or the hub id that it was uploaded under
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
_WITH_PEFT = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = {folder}  # or the hub id that it was uploaded under
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
_TEXT = """\
inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
written = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CHAT = """\
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
written = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TEXT_REWARD = """\
inputs = tokenizer({prompt} + "an answer" + tokenizer.eos_token, return_tensors="pt", return_token_type_ids=False)
print(model(**inputs).logits[0, 0].item())  # the reward
"""
_CHAT_REWARD = """\
messages = [{{"role": "user", "content": {prompt}}}, {{"role": "assistant", "content": "an answer"}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits[0, 0].item())  # the reward
"""


def _prompt(run: RunRecord) -> str:
    for result in run.results:
        for label in (result.label, "before"):
            for answer in run.answers(label, result.name).values():
                return str(answer.get("prompt", "")) or "…"
    return "…"


def _trained(run: RunRecord) -> Iterator[str]:
    parameters, versions = run.manifest.get("parameters") or {}, run.manifest.get("versions") or {}
    train, data = run.table("train"), run.table("data")
    facts = [
        ("method", _named(run.table("method"))),
        ("trained parameters", f"{parameters['trainable']:,} of {parameters['total']:,}" if parameters else ""),
        ("objective", run.table("objective").get("name", "")),
        ("optimizer", _named(run.table("optim"))),
        ("schedule", _named(run.table("schedule"))),
        ("steps", _steps(run)),
        ("tokens", f"{run.last['tokens']:,}" if "tokens" in run.last else ""),
        ("sequences per step", str(train.get("global_batch_size", ""))),
        ("tokens per sequence", f"{data.get('max_length', '')}" + (", packed" if data.get("packing") else "")),
        ("trained on", str(data.get("loss_on", ""))),
        ("computed in", str(run.table("model").get("dtype", ""))),
        ("seed", str(run.recipe.get("seed", ""))),
        ("engine", f"{run.engine} on {run.world} × {run.manifest.get('device', '')}" if run.engine else ""),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in _NAMED if versions.get(name))),
    ]
    yield from ("## Training", "", "| | |", "|---|---|")
    yield from (f"| {name} | {_plain(value)} |" for name, value in facts if value)
    yield ""


def _steps(run: RunRecord) -> str:
    last = str(run.last.get("step", ""))
    return f"{run.best.get('step')} of {last}: the best state" if run.final_label == "best" else last


_NAMED = ("distft", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def _data(run: RunRecord) -> Iterator[str]:
    yield from ("## Data", "")
    for split, what in (("train", "Trained on"), ("eval", "Evaluated on")):
        rows = ((run.care or {}).get("splits") or {}).get(split) or {}
        count = f"{rows['num_rows']:,} rows of " if rows else ""
        paths = ", ".join(f"`{_code(source['path'])}`" for source in _sources(run, split))
        if paths:
            yield f"- {what} {count}{paths}"
    yield from (f"- {_plain(note)}" for note in (run.care or {}).get("notes") or ())
    yield ""


def _limits(run: RunRecord) -> Iterator[str]:
    yield from ("## Limits", "")
    tested = ", ".join(f"`{_code(name)}`" for name in dict.fromkeys(result.name for result in run.results))
    if tested:
        yield f"- Measured on {tested} and nothing else."
    elif _is_reward_model(run):
        yield "- It gives a number and writes no answers; how good a signal it is was measured on held-out pairs alone."
    else:
        yield "- Its answers were not measured on any task."
    worse = [result for result in run.results if result.verdict == "worse"]
    if worse:
        yield f"- Worse than its base: {', '.join(_plain(f'{result.title} on {result.name}') for result in worse)}."
    for sentence in judged_warnings(*run.judged):
        yield f"- Of its held-out rows: {_plain(sentence.partition('  ')[0])}."
    lost = max((result.num_worse for result in run.results), default=0)
    if lost:
        yield f"- Up to {lost:,} evaluated rows are answered worse than before; the run's report lists them."
    rows = ((run.care or {}).get("splits") or {}).get("train") or {}
    if rows and rows["num_rows"] < _FEW_ROWS:
        yield f"- Trained on {rows['num_rows']} rows only."
    yield "- What its base gets wrong, and may not be used for, holds for it too."
    if not _licence(run):
        yield "- The licence of the base model was not known where this was written: look it up before you share this."
    yield ""


def _again(run: RunRecord) -> Iterator[str]:
    digest = str(run.manifest.get("recipe_sha256", ""))
    yield from ("## Make it again", "", "```", f"distft reproduce {run.folder}", "```", "")
    yield (f"Checks the hashes of rows, weights and recipe (sha256 `{digest[:16]}…`), runs it anew and compares every "
           "step's loss and every final tensor.")  # fmt: skip
    yield ""


def _sources(run: RunRecord, split: str) -> list[dict[str, Any]]:
    sources = run.table("data").get(split) or []
    return [source for source in sources if isinstance(source, dict) and "path" in source]


def _named(table: Mapping[str, Any]) -> str:
    """Return a part and its settings: `adamw, learning_rate 0.005`; empty settings are left out."""
    settings = (f"{key} {_value(value)}" for key, value in table.items() if key != "name" and value not in ([], {}))
    return ", ".join([str(table.get("name", "")), *settings]) if table else ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_value(inner)}" for key, inner in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _yaml(text: str) -> str:
    """Return a text as a YAML string: a JSON string is one."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Return a text on one line, without Markdown or HTML of its own."""
    for char, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\["), ("*", "\\*")):
        text = text.replace(char, shown)
    return " ".join(text.split())


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
