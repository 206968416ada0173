"""`distft reproduce` of a real run: bit for bit, in part, on one process of two, and from other rows."""

import json
import sys
from pathlib import Path

import pytest
from harness import STEPS, WHOLE_GRIDS, Bench, run

pytestmark = pytest.mark.dist
PROCESSES, ENGINE = (2, "ddp") if WHOLE_GRIDS else (1, "solo")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path]:
    """A run that `distft train` started: LoRA, whose initial values and dropout are random.

    Engine and micro-batch are left to `auto`: the second run must take what the first one chose.
    """
    bench = Bench.make(tmp_path_factory.mktemp("reproduce"))
    command = [sys.executable, "-m", "distft.cli", "train", str(bench.recipe), "--nproc", str(PROCESSES)]
    method = 'method={ name = "lora", r = 4, dropout = 0.1 }'
    drawn = "temperature = 1.0, max_new_tokens = 8, every_steps = 2"
    asked = f'eval.answers=[{{ name = "drawn", {drawn}, scores = [{{ name = "exact_match" }}] }}]'
    for setting in ("name='first'", method, "optim.weight_decay=0.0", asked):
        command += ["--set", setting]
    done = run(command)
    assert done.returncode == 0, done.stderr[-4000:]
    return bench, bench.folder / "runs/first"


def reproduce(folder: Path, *options: str) -> tuple[int, dict]:
    done = run([sys.executable, "-m", "distft.cli", "reproduce", str(folder), "--json", *options])
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_on_the_same_layout_it_is_equal_bit_for_bit(first: tuple[Bench, Path]) -> None:
    _, folder = first
    code, told = reproduce(folder)
    assert (code, told["verdict"], told["same_layout"]) == (0, "equal", True)
    outcome = told["outcome"]
    assert {column["name"]: column["num_steps"] for column in outcome["columns"]} == {
        "loss": STEPS, "grad_norm": STEPS, "lr": STEPS, "eval_loss": 2,
    }  # fmt: skip
    assert outcome["tensors"]["num_equal"] == outcome["tensors"]["num_tensors"] > 0
    assert outcome["answers"] == {"num_answers": 4 * 9, "num_equal": 4 * 9, "first": "", "missing": []}
    again = Path(told["again"])
    assert f'name = "{ENGINE}"' in (again / "recipe.toml").read_text()
    assert again.parent.name == "first.reproduced-1"
    assert json.loads((again / "manifest.json").read_text())["engine"] == ENGINE
    assert [one for one in told["differences"] if one["kind"] != "told"] == []


@pytest.mark.skipif(not WHOLE_GRIDS, reason="part of the whole grid: make test-all")
def test_a_part_of_it_on_one_process_is_within_the_tolerance(first: tuple[Bench, Path]) -> None:
    """The schedule is that of the whole run, so the first steps compare."""
    _, folder = first
    code, told = reproduce(folder, "--nproc", "1", "--steps", "3")
    assert code == 0, told
    assert told["same_layout"] is False
    assert told["verdict"] in ("within 1e-5", "equal")
    assert outcome_answers(told) == 2 * 9, "before, and at step 2"
    (loss,) = [column for column in told["outcome"]["columns"] if column["name"] == "loss"]
    assert (loss["num_steps"], told["outcome"]["tensors"]) == (3, None)


def outcome_answers(told: dict) -> int:
    answers = told["outcome"]["answers"]
    assert not answers["missing"]
    return answers["num_answers"]


def test_the_run_holds_what_it_depends_on(first: tuple[Bench, Path]) -> None:
    _, folder = first
    said = json.loads((folder / "manifest.json").read_text())
    assert set(said["model"]["files"]) == {"config.json", "generation_config.json", "model.safetensors"}
    assert all(len(digest) == 64 for digest in said["model"]["files"].values())
    assert len(said["sources"]["train"][0]["files"]["train.jsonl"]) == 64
    assert (said["world"], said["nodes"], len(said["devices"])) == (PROCESSES, 1, PROCESSES)
    card = (folder / "final/README.md").read_text()
    assert "library_name: peft" in card
    assert "held-out rows | loss" in card


def test_other_rows_are_no_reproduction(first: tuple[Bench, Path]) -> None:
    bench, folder = first
    rows = bench.folder / "train.jsonl"
    text = rows.read_text()
    try:
        rows.write_text(text + text.splitlines()[0] + "\n")
        code, told = reproduce(folder)
    finally:
        rows.write_text(text)
    assert code == 3
    assert "again" not in told, "nothing was run"
