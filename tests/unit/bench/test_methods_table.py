"""The measured table of methods: its recipes, the rate that is shown, what has not run, what is not repeated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distft import compatibility
from distft.catalog import REGISTRIES
from distft.demo.files import MODEL_CONFIG
from distft.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import methods_table  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def table(tmp_path: Path) -> methods_table.Table:
    return methods_table.Table(folder=tmp_path, assets=tmp_path / "assets", ends=0.0)


def _put_run(table: methods_table.Table, method: str, rate: float, *, loss: float, step_s: float) -> None:
    """Write what a run of the incident task leaves: 10 steps, 50 supervised tokens each."""
    folder = table.folder / "runs" / methods_table.run_name("incident", method, rate)
    interval = {"value": 1 - loss, "low": 0.1, "high": 0.9}
    sets = [
        {"name": "triage", "score": "field_match", "figure": figure, "before": {"value": 0.0, "low": 0.0, "high": 0.0},
         "after": interval, "change": {"verdict": "better"}}
        for figure in ("field_match", "fields_right")
    ]  # fmt: skip
    files: dict[str, Any] = {
        "exit.json": {"reason": "done"},
        "manifest.json": {"parameters": {"trainable": 20, "total": 200}},
        "eval/summary.json": {"sets": sets, "held_out": {"before": {"loss": 6.0}, "after": {"loss": loss}}},
    }
    (folder / "eval").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "recipe.toml").write_text(f'name = "{folder.name}"\n')
    steps = [
        {"step": step, "loss": 1.0, "tokens": 100 * step, "tokens_loss": 50 * step, "step_s": step_s, "memory_gib": 0.5}
        for step in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_recipes_differ_in_method_and_rate_alone(table: methods_table.Table) -> None:
    for base in ("runs/tiny-full/final", "assets/stories260k-hf"):
        (table.folder / base).mkdir(parents=True)
        (table.folder / base / "config.json").write_text(json.dumps(MODEL_CONFIG))
    contents = {"incident": set[str](), "gsm8k": set[str]()}
    for task, method in ((task, method) for task in methods_table.TASKS for method in methods_table.METHODS):
        for rate in methods_table.METHODS[method].rates:
            recipe = load_recipe(str(table.recipe(task, method, rate)), registries=REGISTRIES, overrides=[])
            compatibility.refuse_misfits(recipe)
            assert recipe.name == methods_table.run_name(task, method, rate)
            virtual = method in ("prefix", "prompt")
            assert recipe.data.max_length == 384 + virtual * methods_table.TASKS[task].virtual
            contents[task].add(str((recipe.train, recipe.schedule, recipe.engine, recipe.model, recipe.eval)))
    assert [len(different) for different in contents.values()] == [1, 1]


def test_lowest_held_out_loss_is_shown(table: methods_table.Table) -> None:
    _put_run(table, "full", 1e-3, loss=0.5, step_s=0.2)
    _put_run(table, "full", 3e-3, loss=0.7, step_s=0.4)
    _put_run(table, "lora-r4", 1e-2, loss=0.4, step_s=0.1)
    _put_run(table, "lora-r4", 3e-2, loss=0.3, step_s=0.1)
    rows = {row["method"]: row for row in table.results("incident")}
    assert rows["full"]["rate"] == 1e-3
    assert rows["full"]["speed_ratios"] == [1.0, 1.0]
    lora = rows["lora-r4"]
    assert (lora["rate"], lora["run"]) == (3e-2, "incident-lora-r4-0.03")
    assert lora["speed_ratios"] == pytest.approx([2.0, 4.0])  # each against `full` of its own round
    assert (lora["trained_parameters"], lora["share"]) == (20, 0.1)
    assert lora["sweep"] == {"0.003": None, "0.01": 0.4, "0.03": 0.3}
    text = "\n".join(methods_table.markdown("incident", list(rows.values())))
    assert "| 6.000 → 0.300 | 0.00 → 0.70 [0.10, 0.90] |" in text
    assert "| lora-r4 | 0.003: not run | 0.01: 0.400 | 0.03: 0.300 | 0.03 |" in text
    assert text.count("not run") > 10


def test_what_failed_says_why(table: methods_table.Table) -> None:
    failed = table.folder / "failed/incident-ia3-0.03.txt"
    failed.parent.mkdir()
    failed.write_text("first line\ncut: longer than 240 s\n")
    row = next(row for row in table.results("incident") if row["method"] == "ia3")
    assert row["failed"] == {"0.03": "cut: longer than 240 s"}
    assert "0.03: cut: longer than 240 s" in "\n".join(methods_table.markdown("incident", [row]))


def test_finished_runs_are_not_made_again(table: methods_table.Table) -> None:
    """`ends` has passed, so that what would start is listed instead."""
    base = table.folder / "runs/tiny-full"
    base.mkdir(parents=True)
    (base / "exit.json").write_text(json.dumps({"reason": "done"}))
    _put_run(table, "full", 1e-3, loss=0.5, step_s=0.2)
    stopped = table.folder / "runs/incident-freeze-0.001"
    stopped.mkdir()
    (stopped / "exit.json").write_text(json.dumps({"reason": "stopped by SIGTERM"}))
    table.measure(["incident"])
    assert len(table.left) == 3 * 13 - 1 + 13
    assert "incident-full-0.001" not in table.left
    assert table.left[0] == "incident-freeze-0.001"
    assert table.left.index("bench incident-full") == 12
    assert table.left[-1] == "incident-prompt-0.03"
