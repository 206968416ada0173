"""The rules give what the page says, for every combination a recipe that loads, and the page lists every rule."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from distft.advise.advice import Names, advise, parameters_in_name
from distft.advise.command import main
from distft.advise.rules import GOALS, RULES, Goal, Situation
from distft.catalog import REGISTRIES
from distft.recipe import parse_recipe

PAGE = Path(__file__).parents[3] / "docs" / "choosing.md"
NAMES = Names(name="run", model="some/Model-8B", train="t.jsonl", train_format="messages", held_out=None)
ROWS = (0, 49, 50, 999, 1000, 9_999, 10_000, 49_999, 50_000, 2_000_000)


def decided(**asked: Any) -> dict[str, Any]:
    return {one.rule.decides: one.value for one in advise(Situation(**asked), NAMES, folder=None, machine=None).decided}


def test_the_page_lists_every_rule_with_its_reason_and_source() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"\(`([a-z0-9-]+)`\)$", page, re.MULTILINE) == [rule.name for rule in RULES]
    for rule in RULES:
        for text in (rule.says, rule.why, rule.source):
            assert text in page, (rule.name, text)
    assert set(GOALS) == set(get_args(Goal))
    assert all(f"| `{name}` | {what} |" in page for name, what in GOALS.items())


def test_no_rule_is_without_effect() -> None:
    """Each is the first to apply for something."""
    seen = set()
    for goal, rows, size in itertools.product(GOALS, ROWS, (1e9, 70e9)):
        for names in (NAMES,):
            made = advise(Situation(goal=goal, rows=rows, parameters=size), names, folder=None, machine=None)
            seen |= {one.rule.name for one in made.decided}
    needs_a_plan = {"four-bits-when-short-of-memory", "paged-moments-beside-four-bits"}
    assert seen == {rule.name for rule in RULES} - needs_a_plan


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_combination_is_a_recipe_that_loads(goal: Goal, rows: int) -> None:
    for world, size, longest in itertools.product((1, 6, 8, 512), (None, 70e9), (None, 10, 5_000, 10**6)):
        asked = Situation(
            goal=goal, rows=rows, parameters=size, world=world, longest_chars=longest, typical_chars=longest
        )
        made = advise(asked, NAMES, folder=None, machine=None)
        recipe = parse_recipe(made.recipe, source="advised", registries=REGISTRIES)
        assert recipe.train.global_batch_size % world == 0
        of = {one.rule.decides: one.value for one in made.decided}
        assert recipe.method.name == of["method"]
        assert recipe.optim.params.learning_rate == of["learning_rate"]
        assert recipe.data.max_length == of["max_length"]
        if recipe.method.spec.adapter:
            assert (recipe.method.params.r, recipe.method.params.alpha) == (of["r"], of["alpha"])


class TestWhatIsAdvised:
    def test_approach(self) -> None:
        assert decided(goal="facts", rows=100_000)["approach"] == "retrieve"
        assert decided(goal="style", rows=49)["approach"] == "prompt"
        assert decided(goal="style", rows=50)["approach"] == "fine-tune"

    def test_goals_but_a_domain_differ_in_the_approach_alone(self) -> None:
        for rows in ROWS:
            settings = [decided(goal=goal, rows=rows) for goal in GOALS if goal != "domain"]
            assert len({json.dumps({**one, "approach": ""}) for one in settings}) == 1

    def test_method(self) -> None:
        assert decided(goal="domain", rows=10_000)["method"] == "full"
        assert decided(goal="domain", rows=9_999)["method"] == "lora"
        assert decided(goal="skill", rows=10_000)["method"] == "lora"

    def test_settings_follow_rows_and_size(self) -> None:
        few, many = decided(goal="task", rows=500), decided(goal="task", rows=100_000, parameters=70e9)
        assert (few["r"], few["alpha"], few["learning_rate"], few["epochs"]) == (16, 32, 2e-4, 4)
        assert (many["r"], many["alpha"], many["learning_rate"], many["epochs"]) == (64, 128, 1e-4, 1)
        assert decided(goal="domain", rows=10**6)["learning_rate"] == 2e-5

    def test_a_batch_leaves_steps_after_packing(self) -> None:
        long = decided(goal="task", rows=2000, longest_chars=6000, typical_chars=6000)
        assert (long["max_length"], long["epochs"], long["global_batch_size"]) == (2048, 3, 32)
        short = decided(goal="task", rows=2000, longest_chars=6000, typical_chars=300)  # 20 rows a sequence
        assert short["global_batch_size"] == 8
        assert decided(goal="task", rows=2000, world=6, longest_chars=9, typical_chars=9)["global_batch_size"] == 12


def test_a_models_size_is_read_from_its_name() -> None:
    assert parameters_in_name("meta-llama/Llama-3.1-8B-Instruct") == 8e9
    assert parameters_in_name("Qwen/Qwen2.5-0.5B") == 0.5e9
    assert parameters_in_name("models/70b/") == 70e9
    assert parameters_in_name("gpt2") is None
    assert parameters_in_name("my-8bit-model") is None


class TestCommand:
    def test_writes_a_recipe_and_tells_why(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "run.toml"
        asked = ["--goal", "task", "--model", "some/Model-7B", "--rows", "800", "--write", str(path)]
        assert main(asked) == 0
        said = capsys.readouterr().out
        assert "r                  16  (rank-for-thousands)" in said
        assert "https://arxiv.org/abs/2305.14314" in said
        recipe = parse_recipe(path.read_text(), source=str(path), registries=REGISTRIES)
        assert (recipe.name, recipe.model.path, recipe.train.epochs) == ("advised", "some/Model-7B", 4)
        assert main(asked) == 8  # nothing is overwritten
        assert "exists already" in capsys.readouterr().err

    def test_counts_and_looks_through_the_rows(self, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
        rows = [{"q": "x" * 30, "prompt": f"what is {at} times {at}?", "completion": "ok"} for at in range(60)]
        for name in ("t.jsonl", "v.jsonl"):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = ["--goal", "format", "--model", "m", "--data", str(tmp_path / "t.jsonl"), "--json"]
        assert main([*asked, "--eval", str(tmp_path / "v.jsonl")]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["approach"] == "fine-tune"
        assert made["care"]["num_shared"]["row"] == 60
        recipe = parse_recipe(made["recipe"], source="x", registries=REGISTRIES)
        assert recipe.data.train[0].format == "prompt_completion"
        assert recipe.data.max_length == 512

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ([], ["--goal  is missing", "--model  is missing", "--rows  is missing"]),
            (
                ["--goal", "tsk", "--model", "m", "--rows", "5"],
                ['unknown goal  did you mean "task"?', "allowed: format"],
            ),
            (["--goal", "task", "--model", "m", "--rows", "-5"], ["--rows  is negative"]),
            (["--goal", "task", "--model", "m", "--rows", "5", "--data", "x"], ["no effect with --data"]),
            (["--goal", "task", "--model", "m", "--rows", "5", "--eval", "x"], ["--eval  needs --data"]),
            (["--goal", "task", "--model", "m", "--rows", "5", "--gpu", "h10"], ["unknown GPU"]),
            (["--goal", "task", "--model", "m", "--rows", "5", "--config", "nowhere"], ["no such file"]),
            (["--goal", "task", "--model", "m", "--rows", "5", "--name", "a/b"], ["plain folder name"]),
        ],
    )
    def test_mistakes_are_told_and_nothing_is_written(
        self, flags: list[str], says: list[str], tmp_path, capsys
    ) -> None:
        path = tmp_path / "x.toml"
        assert main([*flags, "--write", str(path)]) == 2
        said = capsys.readouterr().err
        assert all(text in said for text in says)
        assert not path.exists()

    def test_asks_in_a_terminal(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        answers = iter(["style", "some/Model-8B", "700", ""])
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: next(answers))
        assert main([]) == 0
        said = capsys.readouterr().out
        assert "  style    a tone or a voice" in said
        assert 'path = "some/Model-8B"' in said
        assert next(answers, None) is None
