"""Writes docs/importing.md from the importers' tables: `make importing`."""

from __future__ import annotations

import sys
from pathlib import Path

from distft.importers import IMPORTERS, ImporterSpec
from distft.importers.keys import Key, KeyTable

HEAD = """\
# Importing

`distft import FILE [--to RECIPE]` makes a recipe of a file of another tool:

```
distft import lora-8b.yml --gpus 8 --to mine.toml     # Axolotl, LLaMA-Factory, TRL, torchtune: found out by itself
distft import dpo.yaml --task dpo                     # TRL's files do not say for which command they are
distft import job.json --set model.path=Qwen/Qwen2.5-7B-Instruct --set data.train.0.path=rows.jsonl
distft check mine.toml                                # what the rows become: look at the trained tokens
```

- A comment stands above every key that means something else here, and above every default of the tool that is written
  out. Read them: `global_batch_size` above all, which is micro-batch × accumulation × GPUs, and the file does not say
  how many GPUs there were (`--gpus N`; 1 is assumed, and said).
- What has no counterpart is listed at the end of the recipe and on standard error, with its line and what to do. A key
  that the importer does not know is listed too. Nothing is dropped silently; a key that asks for nothing (`false`,
  empty) is not worth a word.
- Where the result would be another model (another loss, another optimizer, NEFTune, a part of the weights), the file is
  refused with exit code 2 and all its lines at once. Remove the key to train without it.
- `--set TABLE.KEY=VALUE` changes the recipe that is written, `--from TOOL` says whose file it is, `--json` prints
  everything for programs. `--to` never overwrites without `--force`.
- Rows are rendered by the chat template, whatever wording the tool writes around them. The numbers of a step differ
  where a comment says so; losses are divided by the tokens (or pairs) of the whole step, as in transformers since 4.46.
- DeepSpeed's JSON files are read for stage and offload; where one is not there, its name is. Engines change no loss.
- Importers of your own are plugins, one file and one line: see [CONTRIBUTING](../CONTRIBUTING.md).

The tables below are made from those that the importers use (`make importing`).
"""


def page() -> str:
    """Return the text of docs/importing.md."""
    return "\n".join([HEAD, *(_tool(spec) for spec in IMPORTERS.values())])


def _tool(spec: ImporterSpec) -> str:
    lines = [f"## {spec.title}", "", f"`{spec.name}`: {spec.told_by}.", ""]
    for section, table in spec.keys.items():
        if section:
            lines += [f"### `{section}`", ""]
        lines += _carried(table) + _grouped(table, "left", "No counterpart") + _grouped(table, "refused", "Refused")
    return "\n".join(lines)


def _carried(table: KeyTable) -> list[str]:
    rows = [(name, key) for name, key in table.items() if key.fate in ("carried", "changed")]
    if not rows:
        return []
    lines = ["| Key | Becomes | What is different |", "|---|---|---|"]
    lines += [f"| `{name}` | `{key.home}` | {_cell(key)} |" for name, key in rows]
    return [*lines, ""]


def _cell(key: Key) -> str:
    return key.text.replace("|", "\\|")


def _grouped(table: KeyTable, fate: str, title: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, key in table.items():
        if key.fate == fate:
            groups.setdefault(_cell(key), []).append(f"`{name}`")
    if not groups:
        return []
    lines = [f"| {title} | Why, or what to do |", "|---|---|"]
    return [*lines, *(f"| {', '.join(names)} | {text} |" for text, names in groups.items()), ""]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
