"""What the benchmarks share: the facts of where a figure was measured, quantiles, and a run inside this process."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict[str, Any]:
    """Date, commit, hardware and versions."""
    from distft.bench.provenance import code, hardware
    from distft.core.environment import versions

    built = code()
    commit = f"{str(built['commit'])[:9]}{'+changes' if built['dirty'] else ''}"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "hardware": hardware(),
        "versions": versions() | _version("trl"),
    }


def _version(library: str) -> dict[str, str]:
    try:
        return {library: importlib.metadata.version(library)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return {"median": ordered[0], "p10": ordered[0], "p90": ordered[0]}
    cuts = statistics.quantiles(ordered, n=10, method="inclusive")
    return {"median": statistics.median(ordered), "p10": cuts[0], "p90": cuts[-1]}


def finish(result: dict[str, Any], out: str | None) -> None:
    """Print the result and keep it."""
    text = json.dumps(result | facts() | {"command": " ".join(["python", *sys.argv])}, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")


WORDS = ("disk", "queue", "login", "payments", "region", "timeout", "cache", "slow", "deploy", "users", "retry")


def write_rows(path: Path, count: int, words: tuple[int, int], *, seed: int = 3) -> None:
    """Rows of text of very different lengths."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choice(WORDS) for _ in range(rng.randint(*words))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_config(folder: Path, config: dict[str, int]) -> None:
    """A Llama's config.json."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**config, bos_token_id=None, eos_token_id=1, pad_token_id=0).save_pretrained(folder)


@dataclass(kw_only=True)
class Window:
    """The next few steps of a run: the loop ends with them and is called again for more."""

    steps: Any
    batches: Iterator[Any]
    left: int = 0

    def samples_in(self, step: int) -> int:
        return self.steps.samples_in(step)

    def from_step(self, step: int) -> Iterator[Any]:
        return itertools.islice(self.batches, self.left)


@dataclass(kw_only=True)
class Run:
    """A recipe's run inside this process, through the parts that `distft.job` uses, driven some steps at a time."""

    recipe_file: Path
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from distft import assemble
        from distft.best import BestTracker
        from distft.catalog import REGISTRIES
        from distft.core.log import quiet_libraries
        from distft.core.protocols import Every
        from distft.engine import processes
        from distft.guard import DivergenceGuard
        from distft.recipe import load_recipe
        from distft.run_folder import RunFolder

        quiet_libraries()

        def quiet(line: str) -> None:
            """Benchmarks print one result."""

        self.recipe = recipe = load_recipe(str(self.recipe_file), registries=REGISTRIES, overrides=self.overrides)
        _, rank, world, _ = processes.detect_launcher(os.environ)
        folder = RunFolder(recipe.run_dir, writes=rank == 0)
        cut = assemble.choose_layout(recipe, world)
        self.rows = assemble.load_data(recipe, cut, rank, world, quiet)
        placed = processes.join(timeout_s=120)
        self.engine = assemble.open_engine(recipe, placed, quiet)
        self.model = assemble.build_model(recipe, placed, cut, self.rows, quiet)
        guard, best = (
            DivergenceGuard(recipe.guard, self.engine, say=quiet, note=folder.note),
            BestTracker(keep=False, patience=None),
        )
        checkpoints, self.state, _ = assemble.open_checkpoints(
            recipe,
            folder,
            self.engine,
            self.rows,
            quiet,
            judges={"guard": guard, "best": best},
            resume="auto",
            allow_changes=False,
        )
        folder.start(recipe.to_toml(), {})
        costs = assemble.run_facts(self.model, placed, self.state)
        assemble.set_up_engine(recipe, self.engine, self.model, cut, self.rows.steps.num_steps)
        self.objective = assemble.build_objective(recipe, self.engine, self.model, cut, self.rows, quiet)
        self._metrics = folder.metrics
        self._window = Window(steps=self.rows.steps, batches=self.rows.steps.from_step(0))
        self._around: dict[str, Any] = {
            "engine": self.engine,
            "objective": self.objective,
            "meters": assemble.build_meters(recipe, folder, costs, self.engine, placed, self.rows.steps, quiet),
            "checkpoints": checkpoints,
            "guard": guard,
            "look": lambda state: None,
            "best": best,
            "stop": lambda: False,
            "every": Every(log=lambda step: True, eval=lambda step: False, save=lambda step: False),
        }

    def go(self, steps: int) -> None:
        """Train on the next `steps` steps."""
        from distft.loop import fit

        self._window.left = steps
        self.state = fit(self.state, self._window, **self._around)

    def losses(self) -> list[float]:
        """Of every step so far."""
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def close(self) -> None:
        """Leave the processes."""
        self._around["meters"].close()
        self._around["checkpoints"].close()
        self.engine.close()


METHOD_RECIPE = """
name = "{name}"
output_dir = "{folder}/runs"
[model]
path = "{base}"
dtype = "float32"
[method]
{method}
[data]
max_length = {max_length}
loss_on = "completion"
{train}
{valid}
[optim]
name = "adamw"
learning_rate = {learning_rate}
betas = [0.9, 0.95]
[schedule]
name = "linear"
warmup_ratio = 0.05
[train]
{duration}
global_batch_size = 8
micro_batch_size = 4
[engine]
name = "{engine}"
{answers}
"""
"""A method on rows of prompts and completions; {train}, {valid} and {answers} are tables, {duration} is the first line
of [train], {method} are the keys of [method]."""
LORA = 'name = "lora"\nr = 16\nalpha = 32'
"""The method of benchmarks of what is done with adapters."""
