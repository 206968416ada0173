"""A job's rows and hyper-parameters on their way to a recipe; and the file that says which models there are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distft.catalog import REGISTRIES
from distft.core.errors import DataError, RecipeError
from distft.recipe import load_recipe
from distft.service.job_folder import JobFolder
from distft.service.job_recipe import RowScan, chosen, scan_rows, write_recipe
from distft.service.runners import RUNNERS
from distft.service.settings import ServedBase, read_settings

CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "?"}]},
    "preferred_output": [{"role": "assistant", "content": "!"}],
    "non_preferred_output": [{"role": "assistant", "content": "-"}],
}


ASKED = {"messages": [{"role": "user", "content": "2 + 2?"}], "right": {"is": 4}}
GRADER = {"type": "string_check", "name": "g", "operation": "like", "input": "{{sample.output_text}}",
          "reference": "{{item.right.is}}"}  # fmt: skip


def scan(tmp_path: Path, content: bytes, method: str = "supervised") -> RowScan:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    grader = GRADER if method == "reinforcement" else None
    return scan_rows(file, method, name="training_file", line_bytes=10_000, grader=grader)


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def test_rows_are_counted_and_their_form_is_found(tmp_path: Path) -> None:
    assert scan(tmp_path, line(CHAT) + b"\n" + line(CHAT)) == RowScan(num_rows=2, form="messages")
    assert scan(tmp_path, line({"prompt": "a", "completion": "b"})[:-1]).form == "prompt_completion"
    assert scan(tmp_path, line(PAIR), "dpo") == RowScan(num_rows=1, form="preference")
    assert scan(tmp_path, line(ASKED), "reinforcement") == RowScan(num_rows=1, form="prompt")


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (b"", "supervised", "training_file: holds no row"),
        (b"\n\n", "supervised", "holds no row"),
        (b"{", "supervised", "line 1: is not valid JSON"),
        (b"[1]\n", "supervised", "line 1: is not a JSON object"),
        (line(CHAT) + b"\xff\xfe\n", "supervised", "line 2: is not valid JSON"),
        (line(CHAT) + b"PK\x03\x04\x14" + b"\x00" * 99, "supervised", "line 2: is not valid JSON"),
        (line(CHAT) + b"x" * 20_000, "supervised", "line 2: is longer than 10,000 bytes"),
        (b'{"messages": ' + b"[" * 9_000, "supervised", "line 1: is nested too deeply|not valid JSON"),
        (line(PAIR), "supervised", 'has "messages" or "prompt", this one has not'),
        (line(CHAT), "dpo", 'has "input", this one has not'),
        (line(PAIR), "reinforcement", 'has "messages", this one has not'),
        (
            line(ASKED) + line({**ASKED, "right": {}}),
            "reinforcement",
            r"line 2: the grader names \{\{item\.right\.is\}\}, which is not there",
        ),
        (line(CHAT) + line({"prompt": "a", "completion": "b"}), "supervised", "line 2: is a row of another form"),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, content: bytes, method: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan(tmp_path, content, method)


@pytest.mark.parametrize("num_rows", [1, 5, 10, 64, 300, 5_000, 200_000])
def test_auto_is_a_value_that_trains(num_rows: int) -> None:
    given = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier", "beta"), "auto")
    values = chosen(given, num_rows)
    assert 1 <= values["batch_size"] <= min(256, num_rows)
    assert 3 <= values["n_epochs"] <= 10
    assert (values["learning_rate_multiplier"], values["beta"]) == (1.0, 0.1)
    steps = math.ceil(num_rows / values["batch_size"]) * values["n_epochs"]
    assert steps >= 100 or values["n_epochs"] == 10
    assert chosen({"n_epochs": 7, "batch_size": 3}, num_rows) == {"n_epochs": 7, "batch_size": 3}


def recipe_of(tmp_path: Path, method: str, form: str, values: dict[str, Any], base: ServedBase) -> Any:
    folder = JobFolder(path=tmp_path / "jobs" / "ftjob-a")
    row = {"messages": CHAT, "prompt_completion": {"prompt": "a", "completion": "b"}, "preference": PAIR,
           "prompt": ASKED}[form]  # fmt: skip
    settings = {"grader": GRADER} if method == "reinforcement" else {}
    folder.make({"layout": (1, 1), "method": {"type": method, method: settings}, "seed": 11, "integrations": None})
    (folder.path / "train.jsonl").write_bytes(line(row))
    write_recipe(folder, base, {"train": RowScan(num_rows=100, form=form)}, values)
    return load_recipe(str(folder.recipe), registries=REGISTRIES)


@pytest.mark.parametrize(
    ("method", "form", "objective", "loss_on"),
    [
        ("supervised", "messages", "sft", "assistant"),
        ("supervised", "prompt_completion", "sft", "completion"),
        ("dpo", "preference", "dpo", "assistant"),
    ],
)
def test_a_job_is_a_recipe(tmp_path: Path, method: str, form: str, objective: str, loss_on: str) -> None:
    base = ServedBase(
        path="demo:tiny-llama", chat_template="plain", recipe={"optim": {"learning_rate": 0.01}, "method": {"r": 4}}
    )
    values = {"n_epochs": 2, "batch_size": 10, "learning_rate_multiplier": 0.5} | (
        {"beta": 0.3} if method == "dpo" else {}
    )
    recipe = recipe_of(tmp_path, method, form, values, base)
    assert (recipe.objective.name, recipe.data.train[0].format, recipe.data.loss_on) == (objective, form, loss_on)
    assert (recipe.train.epochs, recipe.train.global_batch_size, recipe.seed) == (2.0, 10, 11)
    assert recipe.optim.params.learning_rate == pytest.approx(0.005), "the model's own rate, multiplied"
    assert (recipe.method.name, recipe.method.params.r) == ("lora", 4)
    assert recipe.data.max_length == 1024, "no more than the model has positions"
    assert recipe.checkpoint.every_steps == 10, "an epoch"
    assert recipe.run_dir == tmp_path / "jobs" / "ftjob-a" / "runs" / "ftjob-a"
    if method == "dpo":
        assert recipe.objective.params.beta == 0.3


def test_a_job_of_reinforcement_is_a_recipe_whose_reward_is_the_grader(tmp_path: Path) -> None:
    base = ServedBase(
        path="demo:tiny-llama",
        chat_template="plain",
        max_tokens=24,
        recipe={"rollout": {"refill": 1}, "method": {"r": 4}},
    )
    given = dict.fromkeys(
        ("n_epochs", "batch_size", "learning_rate_multiplier", "compute_multiplier", "eval_interval", "eval_samples"),
        "auto",
    )
    values = chosen(given | {"reasoning_effort": "default", "compute_multiplier": 0.5}, 100)
    assert (values["eval_interval"], values["eval_samples"]) == ("auto", "auto"), "nothing is held out"
    recipe = recipe_of(tmp_path, "reinforcement", "prompt", values, base)
    assert (recipe.objective.name, recipe.data.train[0].format) == ("grpo", "prompt")
    rollout = recipe.rollout
    assert (rollout.answers_per_prompt, rollout.max_new_tokens, rollout.refill, rollout.updates) == (4, 24, 1, 1)
    assert [reward["grader"] for reward in rollout.rewards] == [GRADER]
    assert recipe.data.max_length == 4 * 1024
    held = chosen(given, 100, num_held_out=7)
    assert (held["eval_interval"], held["eval_samples"], held["compute_multiplier"]) == (13, 7, 1.0)


def test_a_models_file_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models."a"]\npath = "x"\nmethods = ["dpo"]\n[limits]\njobs_side_by_side = 3\n', encoding="utf-8")
    content = read_settings(file)
    assert (content.models["a"].methods, content.limits.jobs_side_by_side) == (("dpo",), 3)
    for text, message in (
        ("[models.a]\n", r"models\.a\.path"),
        ('[models.a]\npath = "x"\ncolour = 1\n', r"line 3 .*models\.a\.colour"),
        ('[models."a/b"]\npath = "x"\n', "is no name of a model"),
        ('[models.a]\npath = "x"\nnproc = 0\n', r"line 3 .*nproc"),
        ('[models.a]\npath = "x"\nmethods = ["ppo"]\n', "methods"),
        ("[limits]\n", "models"),
        ("models = 3\n", "models"),
        ("[", "cannot be read"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            read_settings(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")


def test_recipes_and_plans_are_for_the_processes_that_the_runner_starts() -> None:
    base = ServedBase(path="demo:tiny-llama", nproc=2, nodes=3, gpus_per_node=8)
    assert RUNNERS["local"].layout(base) == (2, 1)
    assert RUNNERS["slurm"].layout(base) == (8, 3)
    assert RUNNERS["slurm"].layout(base.model_copy(update={"gpus_per_node": 0})) == (1, 3), "a process a node, on CPUs"
