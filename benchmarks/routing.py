"""Three adapters on one base, told apart by their requests: rows and recipes of the routing benchmark.

    python benchmarks/routing.py FOLDER BASE     # writes rows and recipes; then
    distft train FOLDER/lines.toml; … json, note, all; distft router train FOLDER/router.toml

The same kind of incident report is answered in three formats (lines, JSON, a note of one sentence). Which one is wanted
is said in one of several ways, before or behind the report; held-out rows have other reports.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import kit

from distft.demo import incidents

ASKS = {
    "lines": ("Triage:", "Fill in the form:", "Severity, component, summary and next step:"),
    "json": ("Triage as JSON:", "For the ticket api:", "Give the fields as an object:"),
    "note": ("Write a note:", "Tell the owner:", "In one sentence:"),
}
ANSWERS = """
[[eval.answers]]
name = "{name}"
path = "{folder}/{name}-valid.jsonl"
format = "prompt_completion"
max_new_tokens = 80
scores = [{{ name = "exact_match" }}]
"""


def answer(incident: incidents.Incident, style: str) -> str:
    if style == "note":
        return f"{incident.severity} in {incident.component}: {incident.summary}; please {incident.action}."
    return incidents.render(incident, style)  # type: ignore[arg-type]


def write(folder: Path, base: str, num_train: int = 1200, num_valid: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reports = incidents._distinct_reports(random.Random(7), set())
    draw = random.Random(8)
    for split, count in (("train", num_train), ("valid", num_valid)):
        for style, asks in ASKS.items():
            rows = []
            for _ in range(count):
                facts, text = next(reports)
                ask = draw.choice(asks)
                prompt = f"{ask}\n\n{text}\n\n" if draw.random() < 0.5 else f"{text}\n\n{ask}\n"
                rows.append(json.dumps({"prompt": prompt, "completion": answer(facts, style)}) + "\n")
            (folder / f"{style}-{split}.jsonl").write_text("".join(rows))
    table = '[[data.{split}]]\npath = "{folder}/{name}-{file}.jsonl"\nformat = "prompt_completion"\n'

    def tables(split: str, names: tuple[str, ...]) -> str:
        file = {"train": "train", "eval": "valid"}[split]
        return "".join(table.format(split=split, folder=folder, name=name, file=file) for name in names)

    for name in (*ASKS, "all"):
        names = tuple(ASKS) if name == "all" else (name,)
        answers = "".join(ANSWERS.format(name=each, folder=folder) for each in ASKS)
        text = kit.METHOD_RECIPE.format(
            method=kit.LORA, engine="solo",
            name=name, folder=folder, base=base, max_length=384, learning_rate="1e-2", duration="epochs = 3",
            train=tables("train", names), valid=tables("eval", names), answers=answers,
        )  # fmt: skip
        (folder / f"{name}.toml").write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute(), str(Path(sys.argv[2]).absolute()))
