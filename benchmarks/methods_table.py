"""The table of methods, measured: each method on two tasks with the same budget, at three learning rates each.

    python benchmarks/methods_table.py FOLDER ASSETS [--minutes M] [--tasks incident,gsm8k] [--out FILE.json]

ASSETS as DISTFT_ASSETS (stories260k, GSM8K). Each run is `distft train RECIPE --nproc 2` of a recipe in FOLDER/recipes:
the same base, rows, steps, optimizer, schedule and engine (ddp); only [method] and the learning rate differ.
`incident`: the model of recipes/tiny-full.toml, which answers in lines, learns to answer in JSON. `gsm8k`: stories260k,
which knows children's stories, on GSM8K's rows. Methods with virtual tokens get as much longer sequences as those take.
Memory is the most bytes of tensors that exist in a step on one rank, as `distft bench` of the same recipe counts them,
and as the planner says.

Methods take turns within a round of one task and one learning rate, so that a busy minute falls on all of them; speeds
are ratios to `full` of the same round. Of the three learning rates the one with the lowest held-out loss is shown. What
is there already is not made again: the same command goes on where it was. After --minutes nothing new is started, and
the tables say what has not run. FOLDER gets table.md, table.json and compare-TASK.html; --out keeps a copy of the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kit

from distft.bench import cases, provenance
from distft.bench.planned import Planning, peak_bytes, planned_peak
from distft.bench.runner import FINAL
from distft.run_record import EvalFigure, RunRecord, read_run

NPROC = 2
LONGEST_RUN_S = 1200
"""A run that takes longer is ended and cut from the sweep."""
BENCH = ["--nproc", str(NPROC), "--steps", "6", "--warmup", "2", "--json"]
"""For memory; speeds are taken from the runs, which are longer and take turns."""
VIRTUAL_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    keys: str
    """Of [method]."""
    rates: tuple[float, float, float]
    """Learning rates of the sweep."""
    folklore: str
    """What overviews of methods say of its size; not measured and not ours."""


METHODS = {
    "full": Method(keys='name = "full"', rates=(3e-4, 1e-3, 3e-3), folklore="100 %; best quality, most memory"),
    "freeze": Method(
        keys='name = "freeze"\nlast_blocks = 1', rates=(3e-4, 1e-3, 3e-3), folklore="the last layers are enough"
    ),
    "lora-r4": Method(keys='name = "lora"\nr = 4\nalpha = 8', rates=(3e-3, 1e-2, 3e-2), folklore="0.1 %"),
    "lora-r16": Method(
        keys='name = "lora"\nr = 16\nalpha = 32', rates=(3e-3, 1e-2, 3e-2), folklore="0.5 %; as good as full"
    ),
    "lora-r64": Method(
        keys='name = "lora"\nr = 64\nalpha = 128', rates=(3e-3, 1e-2, 3e-2), folklore="2 %; no better than r = 16"
    ),
    "rslora": Method(
        keys='name = "lora"\nr = 16\nalpha = 32\nrslora = true', rates=(1e-3, 3e-3, 1e-2),
        folklore="as LoRA; high ranks learn",
    ),
    "dora": Method(
        keys='name = "lora"\nr = 16\nalpha = 32\ndora = true', rates=(3e-3, 1e-2, 3e-2),
        folklore="as LoRA; better and slower",
    ),
    "pissa": Method(
        keys='name = "lora"\nr = 16\nalpha = 32\ninit = "pissa"', rates=(1e-3, 3e-3, 1e-2),
        folklore="as LoRA; learns faster",
    ),
    "qlora": Method(
        keys='name = "qlora"\nr = 16\nalpha = 32\nquant = { type = "nf4", double = true }', rates=(3e-3, 1e-2, 3e-2),
        folklore="as LoRA; a quarter of the memory, slower",
    ),
    "bottleneck": Method(
        keys='name = "bottleneck"\nsize = 16', rates=(1e-3, 3e-3, 1e-2), folklore="0.5-4 %; slower to serve"
    ),
    "ia3": Method(keys='name = "ia3"', rates=(1e-2, 3e-2, 1e-1), folklore="0.01 %; fast"),
    "prefix": Method(
        keys=f'name = "prefix_tuning"\nnum_virtual_tokens = {VIRTUAL_TOKENS}', rates=(1e-2, 3e-2, 1e-1),
        folklore="0.1 %; fast",
    ),
    "prompt": Method(
        keys=f'name = "prompt_tuning"\nnum_virtual_tokens = {VIRTUAL_TOKENS}', rates=(3e-2, 1e-1, 3e-1),
        folklore="0.001 %; weak on small models",
    ),
}  # fmt: skip
"""Row -> method. The ranges of learning rates are what each method's papers and the project's recipes take, on a model
this small: about ten times what billions of parameters bear."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, budget and questions, equal for all methods."""

    base: str
    train: str
    valid: str
    steps: int
    virtual: int
    """Virtual tokens of a full sequence's documents."""
    answers: str
    """Keys of [[eval.answers]]."""
    figures: tuple[str, ...]
    """Titles of the figures that are shown, as the run record has them."""


TASKS = {
    "incident": Task(
        base="{folder}/runs/tiny-full/final", train="demo:incidents-json/train", valid="demo:incidents-json/valid",
        steps=100, virtual=4 * VIRTUAL_TOKENS, figures=("field_match", "field_match: fields_right"),
        answers='name = "triage"\nmax_rows = 100\nmax_new_tokens = 80\nscores = [{ name = "field_match", '
        'fields = ["severity", "component", "summary", "next"], form = "json" }]',
    ),
    "gsm8k": Task(
        base="{assets}/stories260k-hf", train="{folder}/gsm8k-train.jsonl", valid="{folder}/gsm8k-valid.jsonl",
        steps=60, virtual=VIRTUAL_TOKENS, figures=("numeric", "normalised_match: f1"),
        answers='name = "gsm8k"\nmax_rows = 50\nmax_new_tokens = 96\n'
        'scores = [{ name = "numeric" }, { name = "normalised_match" }]',
    ),
}  # fmt: skip
GSM8K_ROWS = {"train": ("train", 1200), "valid": ("test", 100)}
GSM8K_CHARACTERS = 560
"""Of question and answer: longer rows do not fit into MAX_LENGTH tokens of this small vocabulary."""
MAX_LENGTH = 384
RATES = ("lower", "middle", "higher")
PARTS = (
    ("incident", "middle"),
    ("gsm8k", "middle"),
    ("incident", "memory"),
    ("incident", "higher"),
    ("incident", "lower"),
    ("gsm8k", "higher"),
    ("gsm8k", "lower"),
    ("gsm8k", "memory"),
)
"""Rounds in the order they run in: within each, methods take turns."""
ROWS = """\
[[data.{split}]]
path = "{path}"
format = "prompt_completion"
"""


@dataclass(kw_only=True)
class Table:
    """What has run in one folder, and what runs next."""

    folder: Path
    assets: Path
    ends: float
    """time.monotonic() after which nothing is started."""
    left: list[str] = field(default_factory=list)
    """What was not started."""

    def measure(self, tasks: list[str]) -> None:
        """Run what is missing, the most telling part first."""
        for task, part in PARTS:
            if task not in tasks or (task == "incident" and not self._base()):
                continue
            for method, row in METHODS.items():
                if part == "memory":
                    self._bench(task, method)
                else:
                    self._train(task, method, row.rates[RATES.index(part)])

    def _base(self) -> bool:
        """Train what the incident task starts from; return whether it is there."""
        return finished(self.folder / "runs/tiny-full") or self._start(
            "tiny-full", "train", "recipes/tiny-full.toml", "--nproc", str(NPROC), "--output-dir",
            str(self.folder / "runs"), longest_s=3600,
        )  # fmt: skip

    def _train(self, task: str, method: str, rate: float) -> None:
        name = run_name(task, method, rate)
        if not finished(self.folder / "runs" / name):
            self._start(name, "train", str(self.recipe(task, method, rate)), "--nproc", str(NPROC))

    def _bench(self, task: str, method: str) -> None:
        out = self.folder / "bench" / f"{task}-{method}"
        if bench_record(out).get("outcome") not in FINAL:
            recipe = self.recipe(task, method, METHODS[method].rates[1])
            self._start(f"bench {task}-{method}", "bench", str(recipe), *BENCH, "--output", str(out))

    def _start(self, name: str, *words: str, longest_s: float = LONGEST_RUN_S) -> bool:
        """Run a verb of distft and return whether it ended well; how it failed is kept in FOLDER/failed."""
        failed = self.folder / "failed" / f"{name}.txt"
        if time.monotonic() > self.ends:
            self.left += [name] * (name not in self.left)
            return False
        failed.unlink(missing_ok=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "distft.cli", *words]
        process = subprocess.Popen(command, cwd=kit.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=longest_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # the run saves, ends with 75, and goes on when it is started again
            said = f"{process.communicate()[1]}\ncut: longer than {longest_s:g} s"
        took = f"{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}"
        print(f"{name}: {process.returncode}, {took}", file=sys.stderr, flush=True)
        if process.returncode:
            failed.parent.mkdir(exist_ok=True)
            failed.write_text(said, encoding="utf-8")
        return not process.returncode

    def recipe(self, task: str, method: str, rate: float) -> Path:
        """Write a run's recipe and return its file."""
        what, row, name = TASKS[task], METHODS[method], run_name(task, method, rate)
        places = {"folder": self.folder, "assets": self.assets}
        text = kit.METHOD_RECIPE.format(
            name=name, folder=self.folder, base=what.base.format(**places), method=row.keys, learning_rate=rate,
            train=ROWS.format(split="train", path=what.train.format(**places)),
            valid=ROWS.format(split="eval", path=what.valid.format(**places)),
            duration=f"max_steps = {what.steps}", engine="ddp",
            max_length=MAX_LENGTH + ("num_virtual_tokens" in row.keys) * what.virtual,
            answers=f"[log]\ntensorboard = false\n[[eval.answers]]\n{what.answers}",
        )  # fmt: skip
        path = self.folder / "recipes" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def runs(self, task: str, method: str) -> dict[float, RunRecord]:
        """Return learning rate -> the finished run."""
        folders = {rate: self.folder / "runs" / run_name(task, method, rate) for rate in METHODS[method].rates}
        return {rate: read_run(folder) for rate, folder in folders.items() if finished(folder)}

    def results(self, task: str) -> list[dict[str, Any]]:
        """Return a row for each method with what has run of it."""
        runs = {method: self.runs(task, method) for method in METHODS}
        return [self._row(task, method, runs) for method in METHODS]

    def _row(self, task: str, method: str, runs: dict[str, dict[float, RunRecord]]) -> dict[str, Any]:
        rates, finished_runs = METHODS[method].rates, runs[method]
        sweep = {f"{rate:g}": finished_runs[rate].held_out_losses[1] if rate in finished_runs else None
                 for rate in rates}  # fmt: skip
        row: dict[str, Any] = {"method": method, "sweep": sweep}
        for rate in rates:
            cut = self.folder / "failed" / f"{run_name(task, method, rate)}.txt"
            if cut.is_file():
                row.setdefault("failed", {})[f"{rate:g}"] = cut.read_text(encoding="utf-8").strip().splitlines()[-1]
        row["peak"] = self._memory(task, method)
        losses = {rate: loss for rate, run in finished_runs.items() if (loss := run.held_out_losses[1]) is not None}
        if not losses:
            return row
        rate = min(losses, key=losses.__getitem__)
        run = finished_runs[rate]
        full = dict(enumerate(METHODS["full"].rates))
        ratios = [
            answer_speed(finished_runs[rates[place]]) / answer_speed(runs["full"][full[place]])
            for place in range(len(rates))
            if rates[place] in finished_runs and full[place] in runs["full"]
        ]
        figures = {figure.title: figure for figure in run.results}
        parameters = run.manifest["parameters"]
        return row | {
            "rate": rate,
            "run": run.name,
            "trained_parameters": parameters["trainable"],
            "share": parameters["trainable"] / parameters["total"],
            "tokens": run.last["tokens"],
            "answer_tokens": run.last["tokens_loss"],
            "speed_ratios": ratios,
            "rss_gib": run.peak_gib,
            "loss": {"before": run.held_out_losses[0], "after": run.held_out_losses[1]},
            "figures": {title: shown(figures[title]) for title in TASKS[task].figures},
        }

    def _memory(self, task: str, method: str) -> dict[str, Any]:
        record = bench_record(self.folder / "bench" / f"{task}-{method}")
        plan = self.folder / "planned.json"
        planned = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {}
        memory = {"planned_bytes": planned.get(f"{task}-{method}")}
        if record and record["outcome"] != "measured":
            return memory | {"not_measured": record["reason"]}
        return memory | ({"measured_bytes": peak_bytes(record)} if record else {})

    def plan(self) -> None:
        """Ask the planner for each method's most bytes of tensors in a step, in FOLDER/planned.json."""
        kept, planning = self.folder / "planned.json", Planning()
        peaks = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        for task, method in ((task, method) for task in TASKS for method in METHODS):
            base = TASKS[task].base.format(folder=self.folder, assets=self.assets)
            if f"{task}-{method}" in peaks or not Path(base).is_dir():
                continue
            recipe = self.recipe(task, method, METHODS[method].rates[1])
            case = cases.grid(cases.BenchGrid(recipe=str(recipe), nproc=NPROC))[0]
            # As a case that ran out of memory is planned: as its recipe says, without a measurement.
            record = {"outcome": "memory", "case": case.facts(), "hardware": provenance.hardware()}
            peaks[f"{task}-{method}"] = planned_peak(planning.beside(case, record))
        kept.write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")

    def compare(self, task: str) -> None:
        """Write one page of each method's shown run."""
        folders = [str(self.folder / "runs" / row["run"]) for row in self.results(task) if "run" in row]
        if len(folders) > 1:
            page = self.folder / f"compare-{task}.html"
            words = [sys.executable, "-m", "distft.cli", "compare", *folders, "--out", str(page)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=kit.ROOT)


def run_name(task: str, method: str, rate: float) -> str:
    """Return the name of a run."""
    return f"{task}-{method}-{rate:g}"


def finished(run: Path) -> bool:
    """Return whether a run has come to its end and written its model."""
    ended = run / "exit.json"
    return ended.is_file() and json.loads(ended.read_text(encoding="utf-8"))["reason"] == "done"


def bench_record(folder: Path) -> dict[str, Any]:
    """Return what `distft bench` has kept of its one case; empty where there is nothing."""
    kept = folder / "bench.json"
    return json.loads(kept.read_text(encoding="utf-8"))["records"][0] if kept.is_file() else {}


def answer_speed(run: RunRecord) -> float:
    """Return supervised tokens per second by the median step: virtual tokens are no work done."""
    return run.last["tokens_loss"] / run.last["step"] / statistics.median(value for _, value in run.column("step_s"))


def shown(figure: EvalFigure) -> dict[str, Any]:
    """Return a figure's values with their intervals, and what may be said of the change."""
    return {"before": dict(figure.before or {}), "after": dict(figure.tuned or {}), "verdict": figure.verdict}


def mib(value: int | None) -> str:
    """Show bytes as MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def write_gsm8k(folder: Path, assets: Path) -> None:
    """Write the first rows of GSM8K that fit, as prompts and completions."""
    for split, (source, count) in GSM8K_ROWS.items():
        rows: list[str] = []
        for line in (assets / f"gsm8k/{source}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            if len(row["question"]) + len(row["answer"]) <= GSM8K_CHARACTERS:
                rows.append(json.dumps({"prompt": f"{row['question']}\n\nAnswer:\n", "completion": row["answer"]}))
        (folder / f"gsm8k-{split}.jsonl").write_text("".join(f"{row}\n" for row in rows[:count]), encoding="utf-8")


def markdown(task: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a task's table and its sweep."""
    figures = TASKS[task].figures
    yield f"### {task}\n"
    yield (
        "| method | trained | share | folklore | tensors' peak MiB, measured / planned | host RSS GiB | speed to full "
        f"| held-out loss, before → after | {' | '.join(f'`{title}`, before → after' for title in figures)} |"
    )
    yield "|---|---:|---:|---|---:|---:|---:|---:|" + "---|" * len(figures)
    for row in rows:
        memory = row["peak"].get("not_measured") or " / ".join(
            mib(row["peak"].get(f"{kind}_bytes")) for kind in ("measured", "planned")
        )
        if "run" not in row:
            yield f"| {row['method']} | – | – | {METHODS[row['method']].folklore} | {memory} |" + " not run |" * (
                3 + len(figures)
            )
            continue
        ratios = row["speed_ratios"]
        speed = f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})" if ratios else "–"
        cells = [
            "{before[value]:.2f} → {after[value]:.2f} [{after[low]:.2f}, {after[high]:.2f}]".format(
                **row["figures"][title]
            )
            for title in figures
        ]
        yield (
            f"| {row['method']} | {row['trained_parameters']:,} | {row['share']:.2%} | "
            f"{METHODS[row['method']].folklore} | {memory} | {row['rss_gib']:.2f} | {speed} | "
            f"{row['loss']['before']:.3f} → {row['loss']['after']:.3f} | "
            f"{' | '.join(cells)} |"
        )
    yield "\nThe sweep: held-out loss after training at each learning rate.\n"
    yield f"| method | {' | '.join(RATES)} | shown |"
    yield "|---|---:|---:|---:|---:|"
    for row in rows:
        failed = row.get("failed", {})
        cells = [f"{rate}: {failed.get(rate, 'not run') if loss is None else format(loss, '.3f')}"
                 for rate, loss in row["sweep"].items()]  # fmt: skip
        yield f"| {row['method']} | {' | '.join(cells)} | {row.get('rate', '–')} |"
    yield ""


def main() -> None:
    """Run what is missing and write the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="of runs, tables and pages")
    options.add_argument("assets", type=Path, help="folder with stories260k-hf and gsm8k")
    options.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many minutes")
    options.add_argument("--tasks", default=",".join(TASKS), help="in this order")
    options.add_argument("--out", type=Path, help="copy of the JSON")
    given = options.parse_args()
    folder, assets = given.folder.absolute(), given.assets.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_gsm8k(folder, assets)
    table = Table(folder=folder, assets=assets, ends=time.monotonic() + 60 * given.minutes)
    table.measure(given.tasks.split(","))
    table.plan()
    rows = {task: table.results(task) for task in TASKS}
    result = {"tasks": rows, "methods": {name: vars(row) for name, row in METHODS.items()}, "not_run": table.left}
    (folder / "table.json").write_text(json.dumps(result | kit.facts(), indent=1) + "\n", encoding="utf-8")
    text = "\n".join(line for task in TASKS for line in markdown(task, rows[task]))
    (folder / "table.md").write_text(text, encoding="utf-8")
    for task in TASKS:
        table.compare(task)
    if given.out:
        shutil.copyfile(folder / "table.json", given.out)
    print(text)
    print(f"not run: {', '.join(table.left) or 'nothing'}")


if __name__ == "__main__":
    main()
