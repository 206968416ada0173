"""Configuration files of other tools, imported, checked and trained for two steps: what became of each.

    python benchmarks/imported_configs.py FOLDER --tool axolotl [--task sft] [--run 15] [--out FILE.md]

FOLDER holds files of one tool, in any depth; nothing of them is kept. Every file is imported. Of those that become a
recipe the first `--run` of different settings are scaled down: a random model of half a million parameters, rows made
up in the format and with the columns that the recipe names, 128 tokens, two steps of four sequences in one process;
method, objective, optimizer, schedule, loss and layout of the rows are the file's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distft
from distft.catalog import REGISTRIES
from distft.check import run_check
from distft.core.errors import DistftError, RecipeError
from distft.importers import IMPORTERS, ImportOptions, import_config
from distft.recipe import Recipe, load_recipe

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
ASKED = [(f"What of disk {number}?", f"Look at disk {number} first.") for number in range(24)]


@dataclass
class Outcome:
    """What became of one file."""

    name: str
    result: str
    """"refused", "imported", "trained", or what failed."""
    carried: int = 0
    """Comments: keys that were carried over with another meaning, or defaults of the tool that are written out."""
    left: int = 0
    unknown: int = 0
    reasons: list[str] = field(default_factory=list)
    trains: str = ""
    loss: str = ""


def rows_of(format: str, objective: str) -> list[dict[str, Any]]:
    """Return rows in a format."""
    pair = [("user", "assistant"), ("human", "gpt")][format == "sharegpt"]

    def turns(ask: str, answer: str) -> list[dict[str, str]]:
        keys = ("from", "value") if format == "sharegpt" else ("role", "content")
        return [dict(zip(keys, turn, strict=True)) for turn in zip(pair, (ask, answer), strict=True)]

    if objective in ("kto", "bco"):
        return [{"prompt": ask, "completion": answer, "label": bool(len(ask) % 2)} for ask, answer in ASKED]
    if objective not in ("sft",):
        return [{"prompt": ask, "chosen": answer, "rejected": "No idea."} for ask, answer in ASKED]
    match format:
        case "alpaca":
            return [{"instruction": ask, "input": "", "output": answer} for ask, answer in ASKED]
        case "sharegpt":
            return [{"conversations": turns(ask, answer)} for ask, answer in ASKED]
        case "text":
            return [{"text": f"{ask} {answer}"} for ask, answer in ASKED]
        case "prompt_completion" | "completion":
            return [{"prompt": ask, "completion": answer} for ask, answer in ASKED]
        case _:
            return [{"messages": turns(ask, answer)} for ask, answer in ASKED]


def _made_source(recipe: Recipe, source: Any, folder: Path, name: str) -> str:
    """Write rows as a source wants them, and return its table."""
    objective = recipe.objective.name
    columns = source.columns or {}
    theirs = {ours: name for name, ours in columns.items()}
    rows = []
    for row in rows_of(source.format, objective):
        named = {theirs.get(key, key): value for key, value in row.items()}
        rows.append({column: row.get("prompt", "") for column, ours in columns.items() if ours not in row} | named)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renamed = ", ".join(f"{json.dumps(column)} = {json.dumps(ours)}" for column, ours in columns.items())
    format = source.format if objective == "sft" else "unpaired" if objective in ("kto", "bco") else "preference"
    return f'{{path = "{path}", format = "{format}"{f", columns = {{{renamed}}}" if columns else ""}}}'


def scaled_down(recipe: Recipe, folder: Path) -> list[str]:
    """Return the overrides that make a recipe run here; the rows are written to the folder."""
    train = [_made_source(recipe, source, folder, f"train-{number}") for number, source in enumerate(recipe.data.train)]
    held = [_made_source(recipe, source, folder, f"eval-{number}") for number, source in enumerate(recipe.data.eval)]
    overrides = [
        f"data.train=[{', '.join(train)}]", f"data.eval=[{', '.join(held)}]",
        'model.path="demo:tiny-llama"', 'model.init="random"',
        "model.dtype=\"float32\"", 'data.chat_template="plain"', "data.max_length=256", "train.max_steps=2",
        "train.global_batch_size=4", "train.micro_batch_size=2", 'engine={name="solo"}', 'log.console="off"',
        "log.tensorboard=false", f'output_dir="{folder}/runs"', 'checkpoint.every_steps="off"', 
        "schedule.warmup_steps=1",
    ]  # fmt: skip
    set_here = {"model.tokenizer": recipe.model.tokenizer, "model.revision": recipe.model.revision,
                "log.wandb": recipe.log.wandb, "train.epochs": recipe.train.epochs,
                "schedule.warmup_ratio": recipe.schedule.params.warmup_ratio}  # fmt: skip
    overrides += [f"{key}=" for key, value in set_here.items() if value is not None]
    if recipe.method.name in ("lora", "qlora", "oft"):
        named = getattr(recipe.method.params, "target_modules", "all-linear")
        if not isinstance(named, str) and not {name.rpartition(".")[2] for name in named} <= LLAMA:
            overrides.append('method.target_modules="all-linear"')
    return overrides


def shape(recipe: Recipe) -> tuple[str, ...]:
    """Return what tells recipes apart that train alike."""
    method = recipe.method.params.model_dump(exclude_defaults=True) if recipe.method.params else {}
    formats = tuple(sorted({source.format for source in recipe.data.train}))
    layout = str((recipe.data.packing, recipe.data.loss_on, sorted(method)))
    return recipe.objective.name, recipe.method.name, recipe.optim.name, recipe.schedule.name, *formats, layout


def outcomes(folder: Path, tool: str, task: str | None, most: int) -> Iterator[Outcome]:
    """Import every file and train some."""
    seen: Counter[tuple[str, ...]] = Counter()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".json"))
    trained = 0
    for path in (file for file in files if file.name != "dataset_info.json"):
        name = str(path.relative_to(folder).with_suffix(""))
        try:
            made = import_config(
                path, importers=IMPORTERS, registries=REGISTRIES, tool=tool, options=ImportOptions(task=task)
            )
        except RecipeError as error:
            yield Outcome(name, "refused", reasons=[problem.message for problem in error.problems])
            continue
        told = {"carried": len(made.changed), "left": len(made.left), "unknown": len(made.unknown)}
        with tempfile.TemporaryDirectory() as scratch:
            toml = Path(scratch, "recipe.toml")
            toml.write_text(made.toml, encoding="utf-8")
            recipe = load_recipe(toml, registries=REGISTRIES)
            kind = shape(recipe)
            seen[kind] += 1
            trains = ", ".join(kind[:4])
            if seen[kind] > 1 or trained >= most:
                yield Outcome(name, "imported", trains=trains, **told)
                continue
            trained += 1
            try:
                small = load_recipe(toml, registries=REGISTRIES, overrides=scaled_down(recipe, Path(scratch)))
                run_check(small, samples=1)
                lines = (distft.train(small).folder / "metrics.jsonl").read_text().splitlines()
                losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
                loss = f"{losses[0]:.3f}, {losses[-1]:.3f}"
                yield Outcome(name, "trained", trains=trains, loss=loss, **told)
            except DistftError as error:
                problems = error.problems if isinstance(error, RecipeError) else ()
                reasons = [problem.message for problem in problems] or [f"{type(error).__name__}: {error}"]
                yield Outcome(name, "imported, not run", trains=trains, reasons=reasons, **told)


def page(found: list[Outcome]) -> Iterator[str]:
    """Write the table of what ran, and the reasons of what did not."""
    counts = Counter(outcome.result for outcome in found)
    yield ", ".join(f"{count} {result}" for result, count in counts.most_common())
    yield "\n| file | objective, method, optimizer, schedule | changed | left | unknown | loss, steps 1 and 2 |"
    yield "|---|---|---:|---:|---:|---|"
    for one in found:
        if one.result == "trained":
            yield f"| {one.name} | {one.trains} | {one.carried} | {one.left} | {one.unknown} | {one.loss} |"
    for result in ("imported, not run", "refused"):
        reasons = Counter(
            reason.splitlines()[0][:110] for one in found if one.result == result for reason in one.reasons
        )
        if reasons:
            yield f"\n{result}:\n"
            yield from (f"- {count} x {reason}" for reason, count in reasons.most_common())


def main() -> None:
    """Read the command line and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tool", required=True, choices=sorted(IMPORTERS))
    parser.add_argument("--task")
    parser.add_argument("--run", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = "\n".join(page(list(outcomes(given.folder, given.tool, given.task, given.run)))) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
