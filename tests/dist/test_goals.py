"""The goals of tokens per second: every one is there and its recipe is valid, and the script runs at toy size."""

import json
import sys
from pathlib import Path

import pytest
from harness import ROOT, run

from distft.catalog import REGISTRIES
from distft.recipe import load_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import goals

WANTED = {
    # config, method, tokens in a row, tokens per second on an H200; as the goals were set
    ("Llama-3.1-8B", "full", 4096, 10_500),
    ("Llama-3.1-8B", "full", 4096, 12_200),
    ("Llama-3.1-8B", "lora", 4096, 15_000),
    ("Llama-3.1-8B", "qlora", 8192, 14_200),
    ("Qwen2.5-7B", "lora", 4096, 16_500),
    ("Qwen2.5-0.5B", "full", 4096, 125_000),
    ("Llama-3.1-70B", "qlora", 4096, 1_200),
}


def test_every_goal_is_measured() -> None:
    there = {(goal.config, goal.method, goal.length, goal.tokens_per_s) for goal in goals.GOALS.values()}
    assert there >= WANTED
    qlora = goals.GOALS["llama8b-qlora"].least_share_of
    assert qlora == ("llama8b-lora-8k", 0.95)
    assert list(goals.GOALS).index("llama8b-lora-8k") < list(goals.GOALS).index("llama8b-qlora"), "measured before it"
    assert goals.GOALS["llama8b-lora-8k"].length == goals.GOALS["llama8b-qlora"].length


@pytest.mark.parametrize("name", goals.GOALS)
def test_its_recipe_is_valid(name: str, tmp_path: Path) -> None:
    goal = goals.GOALS[name]
    file = tmp_path / "goal.toml"
    file.write_text(goals.recipe_text(name, goal, tmp_path, tiny=False))
    recipe = load_recipe(str(file), registries=REGISTRIES, overrides=list(goal.settings))
    assert recipe.method.name == goal.method
    assert recipe.data.max_length == goal.length


def test_a_rate_is_held_against_another_only_where_both_were_measured() -> None:
    qlora = goals.GOALS["llama8b-qlora"]
    one, other = {"name": "llama8b-lora-8k", "tokens_per_s": 100.0}, {"name": "llama8b-qlora", "tokens_per_s": 96.0}
    assert goals.beside(qlora, [one, other])["share_of"]["share"] == pytest.approx(0.96)
    assert goals.beside(qlora, [other]) == {}
    assert goals.beside(qlora, [one, {"name": "llama8b-qlora", "note": "not started"}]) == {}


@pytest.mark.slow  # the first hour on a GPU, at toy size in CI, measures goals too
def test_it_runs_at_toy_size(tmp_path: Path) -> None:
    only = ["--only", "llama8b-lora", "--only", "llama8b-full-kept"]
    done = run([sys.executable, "benchmarks/goals.py", "--tiny", *only, "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "goals.json").read_text())
    assert [goal["name"] for goal in found["goals"]] == ["llama8b-lora", "llama8b-full-kept"]
    for goal in found["goals"]:
        assert goal["tokens_per_s"] > 0, goal
        assert goal["share_of_goal"] is None, "a toy reaches no goal"
