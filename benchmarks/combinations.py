"""Two adapters of one pretrained model, combined in each way: the scores of both tasks, with intervals.

    python benchmarks/combinations.py FOLDER ASSETS   # half an hour on one busy core; ASSETS as DISTFT_ASSETS

`tool` answers a request with the call of a function (Glaive's demo chats), `incident` an incident report with four
lines of triage (the demo's reports); `both` is one adapter trained on the rows of both. The base is stories260k, which
can do neither. It knows no braces, underscores or ends of text (tokens that its training never had look alike), so
calls are written in words, and what comes behind the shown fields is not judged. Rows that are named by a way are made
of `tool` and `incident`; those of `both - tool` take a behaviour away. FOLDER/table.md and table.json have a row for
each. What is there already is not made again.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kit

from distft.demo import incidents

TASKS = {"tool": "field_match", "incident": "fields_right"}
"""Task -> the figure that is shown: the right function; the share of three fields that are right."""
FIELDS = {"tool": ["tool"], "incident": ["severity", "component", "summary"]}
MOST_TOKENS = {"tool": 40, "incident": 120}
TRAINED_CHATS = 200
"""Of the 300; held-out calls are of other chats."""
SOURCE = '[[data.{split}]]\npath = "{folder}/{task}-{file}.jsonl"\nformat = "prompt_completion"\n'
ANSWERS = """
[[eval.answers]]
name = "{task}"
path = "{folder}/{task}-valid.jsonl"
format = "prompt_completion"
max_new_tokens = {most}
scores = [{{ name = "field_match", fields = {fields} }}]
"""
ASKED_BY = "tool"
"""Run whose recipe asks the questions of both tasks, of every model."""
STEPS = {"tool": 250, "incident": 500, "both": 400}
WAYS: dict[str, tuple[list[str], list[str]]] = {
    "linear": (["tool", "incident"], ["--weights", "1", "1"]),
    "cat": (["tool", "incident"], ["--weights", "1", "1"]),
    "linear 0.5": (["tool", "incident"], ["--weights", "0.5", "0.5"]),
    "svd": (["tool", "incident"], ["--weights", "0.5", "0.5"]),
    "slerp": (["tool", "incident"], ["--t", "0.5"]),
    "ties": (["tool", "incident"], ["--density", "0.5"]),
    "magnitude_prune": (["tool", "incident"], ["--density", "0.5", "--weights", "0.5", "0.5"]),
    "dare_linear": (["tool", "incident"], ["--density", "0.8", "--seed", "0", "--weights", "0.5", "0.5"]),
    "dare_ties": (["tool", "incident"], ["--density", "0.8", "--seed", "0", "--weights", "0.5", "0.5"]),
    "della": (["tool", "incident"], ["--density", "0.7", "--seed", "0", "--weights", "0.5", "0.5"]),
    "cat 0.85": (["tool", "incident"], ["--weights", "0.85", "0.15"]),
    "cat 0.15": (["tool", "incident"], ["--weights", "0.15", "0.85"]),
    "both - 0.15 tool": (["both", "tool"], ["--weights", "1", "-0.15"]),
    "both - 0.3 tool": (["both", "tool"], ["--weights", "1", "-0.3"]),
    "both - 0.5 tool": (["both", "tool"], ["--weights", "1", "-0.5"]),
}
"""Row -> (what is combined, flags); the way is the row's first word, and `cat` where adapters are subtracted."""


def tool_rows(assets: Path) -> dict[str, list[dict[str, str]]]:
    """Return requests with the call that the chat answers them with, for training and held out."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "valid": []}
    for number, line in enumerate((assets / "chat-glaive-toolcall/messages.jsonl").open(encoding="utf-8")):
        messages = json.loads(line)["messages"]
        for asked, answered in itertools.pairwise(messages):
            if asked["role"] == "user" and answered.get("tool_calls"):
                function = answered["tool_calls"][0]["function"]
                given = ", ".join(f"{key} {value}" for key, value in function["arguments"].items())
                call = f"tool: {function['name']}\nwith: {given}".replace("_", " ")
                row = {"prompt": f"{asked['content']}\n\nCall:\n", "completion": call}
                rows["train" if number < TRAINED_CHATS else "valid"].append(row)
    return rows


def incident_rows(num_train: int = 1600, num_valid: int = 100) -> dict[str, list[dict[str, str]]]:
    """Return reports with their triage; no report is in both."""
    reports = incidents._distinct_reports(random.Random(7), set())
    made = [
        {"prompt": text + incidents.PROMPT_END, "completion": incidents.render(facts, "lines")}
        for facts, text in (next(reports) for _ in range(num_train + num_valid))
    ]
    return {"train": made[:num_train], "valid": made[num_train:]}


def write(folder: Path, assets: Path) -> None:
    """Write rows and recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in {"tool": tool_rows(assets), "incident": incident_rows()}.items():
        for split, each in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
            (folder / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")
    for name, steps in STEPS.items():
        tasks = list(TASKS) if name == "both" else [name]
        train = "".join(SOURCE.format(split="train", folder=folder, task=task, file="train") for task in tasks)
        valid = "".join(SOURCE.format(split="eval", folder=folder, task=task, file="valid") for task in TASKS)
        answers = "".join(
            ANSWERS.format(folder=folder, task=task, most=MOST_TOKENS[task], fields=json.dumps(FIELDS[task]))
            for task in TASKS
        )
        base = assets / "stories260k-hf"
        text = kit.METHOD_RECIPE.format(
            method=kit.LORA, engine="solo",
            name=name, folder=folder, base=base, max_length=512, learning_rate="5e-3", duration=f"max_steps = {steps}",
            train=train, valid=valid, answers=answers,
        )  # fmt: skip
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def run(*words: str) -> None:
    """Run a verb of distft; its output goes to our own."""
    print("$ distft", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "distft.cli", *words], check=True, stdout=sys.stderr)


def figure(folder: Path, run_name: str, label: str, task: str) -> dict[str, Any]:
    """Return the shown figure of a task with its interval, as the run keeps it."""
    kept = json.loads((folder / f"runs/{run_name}/eval/{label}/{task}.json").read_text(encoding="utf-8"))
    return dict(kept["scores"][0]["intervals"][TASKS[task]])


def held_out(folder: Path, run_name: str, label: str) -> float:
    """Return the held-out loss of both tasks' answers together, nats a token."""
    kept = json.loads((folder / f"runs/{run_name}/eval/{label}/held_out.json").read_text(encoding="utf-8"))
    return float(kept["loss"])


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for the base, each adapter and each combination."""
    for name in STEPS:
        if not (folder / f"runs/{name}/final").is_dir():
            run("train", str(folder / f"{name}.toml"))
    yield row(folder, "base", "before", None)
    for name in STEPS:
        label = "after" if name == ASKED_BY else name
        if not (folder / f"runs/{ASKED_BY}/eval/{label}").is_dir():
            run(
                "eval", str(folder / "runs" / ASKED_BY), "--model", str(folder / f"runs/{name}/final"), "--label", label
            )
        yield row(folder, name, label, None)
    for name, (parts, flags) in WAYS.items():
        slug = name.replace(" ", "").replace(".", "")
        out = folder / "combined" / slug
        if not out.is_dir():
            how = "cat" if "-" in name else name.split()[0]
            places = [
                folder / "runs" / part if (folder / "runs" / part).is_dir() else folder / "combined" / part
                for part in parts
            ]
            base = json.loads((folder / "runs/tool/manifest.json").read_text(encoding="utf-8"))["model"]["folder"]
            run("adapters", "combine", *map(str, places), "--base", base, "--how", how, *flags, "--out", str(out))
        if not (folder / f"runs/{ASKED_BY}/eval/{slug}").is_dir():
            # Merged: the recipe has another rank and scale than the combined adapter.
            merged, rows = folder / "merged" / slug, str(folder / "incident-valid.jsonl")
            if not merged.is_dir():
                run("merge", str(out), "--out", str(merged), "--dtype", "float32", "--rows", rows)
            run("eval", str(folder / "runs" / ASKED_BY), "--model", str(merged), "--label", slug)
        report = json.loads((out / "combine.json").read_text(encoding="utf-8"))
        yield row(folder, " ".join([name, *flags]), slug, (report["rank"], report["relative_error"]))


def row(folder: Path, name: str, label: str, kept: tuple[int, float] | None) -> dict[str, Any]:
    """Return one row of the table."""
    scores = {task: figure(folder, ASKED_BY, label, task) for task in TASKS}
    return {"name": name, **scores, "loss": held_out(folder, ASKED_BY, label), "rank and error": kept}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table in markdown."""
    yield "| model | tool calls: right function | incidents: fields right | held-out loss | rank | its error |"
    yield "|---|---|---|---:|---:|---:|"
    for each in rows:
        cells = ["{value:.2f} [{low:.2f}, {high:.2f}]".format(**each[task]) for task in TASKS]
        rank, error = each["rank and error"] or ("", "")
        shown = f"{error:.3f}" if error != "" else ""
        yield f"| {each['name']} | {' | '.join(cells)} | {each['loss']:.3f} | {rank} | {shown} |"


def main() -> None:
    """Write what is missing, measure, and write the table."""
    folder, assets = (Path(word).absolute() for word in sys.argv[1:3])
    if not (folder / "both.toml").is_file():
        write(folder, assets)
    rows = list(measure(folder))
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(table(rows)) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
