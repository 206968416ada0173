"""The rules give what the page says, for every combination a recipe that loads, and the page lists every rule."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from distft.advise.advice import Names, advise, decisions, parameters_in_name
from distft.advise.command import main
from distft.advise.rules import RULES
from distft.advise.situation import ADVISED, GOALS, AdvisedMethod, Goal, Situation
from distft.catalog import REGISTRIES
from distft.recipe import parse_recipe

PAGE = Path(__file__).parents[3] / "docs" / "choosing.md"
NAMES = Names(name="run", model="some/Model-8B", train="t.jsonl", train_format="messages", held_out=None)
FORMATS = {"answers": "messages", "pairs": "preference", "labels": "unpaired"}
HOLD: tuple[dict[str, Any], ...] = (
    {"rows_hold": "answers"}, {"rows_hold": "labels"}, {"rows_hold": "pairs"},
    {"rows_hold": "pairs", "pretrained": True}, {"rows_hold": "pairs", "longer": 0.8},
)  # fmt: skip
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
        for hold in HOLD:
            made = advise(Situation(goal=goal, rows=rows, parameters=size, **hold), NAMES, folder=None, machine=None)
            seen |= {one.rule.name for one in made.decided}
    for method in ADVISED:
        seen |= {one.rule.name for one in decisions(Situation(goal="task", rows=9, rows_hold="prompts", method=method))}
    needs_a_plan = {"four-bits-when-short-of-memory"}
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
        assert recipe.objective.name == of["objective"]
        if recipe.method.spec.adapter:
            assert (recipe.method.params.r, recipe.method.params.alpha) == (of["r"], of["alpha"])


@pytest.mark.parametrize("hold", HOLD, ids=lambda hold: "-".join(map(str, hold.values())))
@pytest.mark.parametrize("goal", ["task", "reward"])
@pytest.mark.parametrize("rows", [49, 999, 1000, 2_000_000])
def test_every_preference_recipe_loads_with_its_settings(goal: Goal, rows: int, hold: dict[str, Any]) -> None:
    names = replace(NAMES, train_format=FORMATS[hold["rows_hold"]])
    made = advise(Situation(goal=goal, rows=rows, **hold), names, folder=None, machine=None)
    recipe = parse_recipe(made.recipe, source="advised", registries=REGISTRIES)
    of = {one.rule.decides: one.value for one in made.decided}
    assert recipe.objective.name == of["objective"]
    for key in {"beta", "sft_weight", "center"} & of.keys():
        assert getattr(recipe.objective.params, key) == of[key]
    assert recipe.data.train[0].format == names.train_format
    assert recipe.optim.params.learning_rate == of["learning_rate"]
    if of["objective"] == "sft":
        assert "[objective]" not in made.recipe


class TestWhatIsAdvised:
    def test_objective(self) -> None:
        def objective(**asked: Any) -> str:
            return decided(rows=5000, **{"goal": "style", **asked})["objective"]

        assert objective() == "sft"
        assert objective(rows_hold="pairs") == "dpo"
        assert objective(rows_hold="labels") == "kto"
        assert objective(rows_hold="pairs", pretrained=True) == "orpo", "one stage"
        assert objective(rows_hold="pairs", pretrained=True, longer=0.9) == "orpo"
        assert objective(rows_hold="pairs", longer=0.75) == objective(rows_hold="pairs", longer=0.25) == "simpo"
        assert objective(rows_hold="pairs", longer=0.74) == "dpo"
        assert objective(rows_hold="pairs", goal="reward", pretrained=True) == "reward"
        assert objective(rows_hold="pairs", goal="domain") == "dpo", "the rows decide"

    def test_settings_of_preferences(self) -> None:
        few, many = (decided(goal="style", rows=rows, rows_hold="pairs") for rows in (999, 1000))
        assert (few["beta"], few["sft_weight"], few["learning_rate"], few["epochs"]) == (0.1, 1.0, 5e-6, 3)
        assert (many["beta"], many["learning_rate"], many["epochs"]) == (0.1, 5e-6, 1)
        assert "sft_weight" not in many
        everything = decided(goal="domain", rows=20_000, rows_hold="pairs")
        assert (everything["method"], everything["learning_rate"]) == ("full", 5e-7)
        reward = decided(goal="reward", rows=200, rows_hold="pairs")
        assert (reward["center"], reward["learning_rate"], reward["epochs"]) == (0.01, 1e-4, 1)
        orpo = decided(goal="style", rows=200, rows_hold="pairs", pretrained=True)
        assert (orpo["beta"], orpo["learning_rate"], orpo["epochs"]) == (0.1, 5e-5, 4), (
            "its SFT part sees rows so often"
        )
        assert decided(goal="style", rows=5000, rows_hold="pairs", longer=1.0)["beta"] == 2.5
        assert not {"beta", "sft_weight", "center"} & decided(goal="style", rows=5000).keys()

    def test_approach(self) -> None:
        assert decided(goal="facts", rows=100_000)["approach"] == "retrieve"
        assert decided(goal="style", rows=49)["approach"] == "prompt"
        assert decided(goal="style", rows=50)["approach"] == "fine-tune"

    def test_goals_but_a_domain_and_a_reward_model_differ_in_the_approach_alone(self) -> None:
        for rows in ROWS:
            settings = [decided(goal=goal, rows=rows) for goal in GOALS if goal not in ("domain", "reward")]
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


@pytest.mark.parametrize(
    ("method", "rate", "rules"),
    [("full", 2e-5, {"rate-of-all-weights", "adamw"}), ("lora", 2e-4, {"rate-of-adapters", "rank-for-thousands"}),
     ("qlora", 2e-4, {"paged-moments-beside-four-bits"})],
)  # fmt: skip
def test_a_chosen_method_is_kept_and_the_rest_is_for_it(method: AdvisedMethod, rate: float, rules: set[str]) -> None:
    asked = Situation(goal="task", rows=500, method=method)
    made = advise(asked, NAMES, folder=None, machine=None)
    of = {one.rule.decides: one for one in made.decided}
    assert (of["method"].value, of["method"].rule.name) == (method, "the-method-is-chosen")
    assert of["learning_rate"].value == rate
    assert ("r" in of) == (method != "full")
    assert rules <= {one.rule.name for one in made.decided}
    assert "methods" not in of, "there is nothing to choose among"
    recipe = parse_recipe(made.recipe, source="advice", registries=REGISTRIES)
    assert recipe.method.name == method
    assert [one.rule.name for one in decisions(asked)] == [one.rule.name for one in made.decided]


def test_of_prompts_with_a_grader_it_says_what_is_known() -> None:
    of = {one.rule.decides: one.value for one in decisions(Situation(goal="task", rows=9, rows_hold="prompts"))}
    assert (of["approach"], of["objective"]) == ("fine-tune", "grpo"), "prompts without answers are no examples"
    assert "learning_rate" not in of, "it depends on the method, which was not said"
    full = Situation(goal="task", rows=9, rows_hold="prompts", method="full")
    of = {one.rule.decides: one.value for one in decisions(full)}
    assert of["learning_rate"] == 1e-6
    assert not {"epochs", "global_batch_size"} & of.keys()


def test_the_command_takes_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--goal", "task", "--model", "some/Model-8B", "--rows", "500", "--json", "--method"]
    assert main([*asked, "full"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["what"]: one["value"] for one in told["decided"]}["learning_rate"] == 2e-5
    assert 'name = "full"' in told["recipe"]
    assert main([*asked, "qlra"]) == 2
    said = capsys.readouterr().err
    assert "--method qlra  no rule is about it" in said
    assert 'did you mean "qlora"?' in said


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
        ("row", "flags", "expected"),
        [
            ({"chosen": "aye, {n}", "rejected": "nay, {n}"}, [], ("dpo", "preference", 5e-6)),
            ({"chosen": "aye, {n}", "rejected": "nay, {n}"}, ["--pretrained"], ("orpo", "preference", 5e-5)),
            ({"chosen": "yes, it is {n}, and more", "rejected": "no {n}"}, [], ("simpo", "preference", 5e-6)),
            ({"chosen": "no {n}", "rejected": "yes, it is {n}, and more"}, [], ("simpo", "preference", 5e-6)),
            ({"chosen": "a {n}", "rejected": "b {n}"}, ["--goal", "reward"], ("reward", "preference", 1e-4)),
            ({"completion": "it is {n}", "label": True}, [], ("kto", "unpaired", 5e-6)),
            ({"completion": "it is {n}", "label": True}, ["--goal", "preference"], ("kto", "unpaired", 5e-6)),
        ],
    )
    def test_the_objective_is_by_the_rows(
        self, row: dict[str, Any], flags: list[str], expected: tuple, tmp_path: Path, capsys, monkeypatch
    ) -> None:
        monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
        rows = [
            {"prompt": f"is it {n}?"} | {key: value.format(n=n) if isinstance(value, str) else value
                                         for key, value in row.items()}
            for n in range(60)
        ]  # fmt: skip
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert main(["--goal", "style", "--model", "m", "--data", str(tmp_path / "t.jsonl"), "--json", *flags]) == 0
        recipe = parse_recipe(json.loads(capsys.readouterr().out)["recipe"], source="x", registries=REGISTRIES)
        assert (recipe.objective.name, recipe.data.train[0].format, recipe.optim.params.learning_rate) == expected

    def test_a_pair_needs_room_for_its_prompt_twice(self, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
        prompt = "word " * 200  # 1,000 characters: 333 tokens of three
        for name, row in (("pairs", {"chosen": "a", "rejected": "b"}), ("answers", {"completion": "a"})):
            rows = [{"prompt": f"{prompt}{n}", **row} for n in range(60)]
            (tmp_path / name).mkdir()
            (tmp_path / name / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
            assert main(["--goal", "style", "--model", "m", "--data", str(tmp_path / name / "t.jsonl"), "--json"]) == 0
            recipe = parse_recipe(json.loads(capsys.readouterr().out)["recipe"], source="x", registries=REGISTRIES)
            assert recipe.data.max_length == {"pairs": 1024, "answers": 512}[name]

    @pytest.mark.parametrize(
        ("row", "flags", "says"),
        [
            ({"completion": "a"}, ["--goal", "reward"], "--goal reward  needs pairs, and"),
            ({"completion": "a", "label": True}, ["--goal", "reward"], "has rows of format unpaired"),
            ({"completion": "a"}, ["--goal", "preference"], "needs rows that judge answers"),
            ({"completion": "a"}, ["--goal", "task", "--pretrained"], "--pretrained  has no effect here"),
            ({"chosen": "a", "rejected": "b"}, ["--goal", "reward", "--pretrained"], "no effect with --goal reward"),
        ],
    )
    def test_rows_that_do_not_fit_the_goal(
        self, row, flags: list[str], says: str, tmp_path, capsys, monkeypatch
    ) -> None:
        monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": f"p{n}", **row}) + "\n" for n in range(60)))
        assert main(["--model", "m", "--data", str(tmp_path / "t.jsonl"), *flags]) == 2
        assert says in capsys.readouterr().err

    def test_preferences_that_are_not_there_yet(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--goal", "preference", "--model", "m-8B", "--rows", "20000"]) == 0
        said = capsys.readouterr().out
        assert "objective          dpo  (pairs-are-dpo)" in said
        assert 'format = "preference"' in said
        assert main(["--goal", "style", "--model", "m", "--rows", "500", "--pretrained"]) == 2
        assert "--pretrained  has no effect here: there are no pairs" in capsys.readouterr().err

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
