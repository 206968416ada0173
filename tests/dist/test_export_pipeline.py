"""Train, go back to the best state, merge, export at every level, chat: one run, through the command line alone."""

import json
import random
import subprocess
import sys
from pathlib import Path

import export_kit as kit
import pytest

from distft.export_formats.command import main
from distft.report.command import main as report

pytestmark = [pytest.mark.dist, pytest.mark.slow]

MEANS = {"red": "stop now", "green": "go on", "big": "look up", "little": "look down"}
RECIPE = """
name = "signals"
seed = 1
output_dir = "{folder}/runs"
[model]
path = "{base}"
dtype = "float32"
[method]
name = "lora"
r = 16
alpha = 32
rslora = true
[data]
max_length = 64
loss_on = "completion"
[[data.train]]
path = "{folder}/train.jsonl"
format = "messages"
[[data.eval]]
path = "{folder}/valid.jsonl"
format = "messages"
[optim]
name = "adamw"
learning_rate = 3e-3
[train]
max_steps = 240
global_batch_size = 16
micro_batch_size = 16
load_best = true
[engine]
name = "solo"
[checkpoint]
every_steps = 120
best = true
[eval]
every_steps = 120
best_by = "meanings.exact_match"
[[eval.answers]]
name = "meanings"
path = "{folder}/valid.jsonl"
format = "messages"
max_new_tokens = 8
every_steps = 120
scores = [{{ name = "exact_match" }}]
"""


def rows(count: int, seed: int) -> str:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        sign = draw.choice(list(MEANS))
        thing = draw.choice(["ball", "dog", "cat", "tree", "mat"])
        chat = [{"role": "user", "content": f"the {sign} {thing}"}, {"role": "assistant", "content": MEANS[sign]}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    base = kit.save_model(folder / "base")
    (folder / "train.jsonl").write_text(rows(400, 0))
    (folder / "valid.jsonl").write_text(rows(24, 1))
    (folder / "signals.toml").write_text(RECIPE.format(folder=folder, base=base))
    done = subprocess.run(
        [sys.executable, "-m", "distft.train", str(folder / "signals.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "signals"


def test_levels_of_a_run_with_its_own_score_then_a_chat(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gguf"
    assert main([str(run), "--as", "gguf", "--level", "Q8_0", "--max-drop", "0.2", "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    level = made["levels"][0]
    assert made["source"]["adapter"]
    assert made["rows"]["from"].startswith("prompts of the run's evaluation")
    assert all(check["ok"] for check in level["checks"])
    task = {figure["name"]: figure for figure in level["task"]}["meanings.exact_match"]
    assert task["tuned"] - task["before"] > 0.5, "the run learned"
    assert task["lost"] <= 0.2
    assert (out / "recipe.toml").read_text() == (run / "recipe.toml").read_text()
    card = (out / "README.md").read_text()
    assert "llama-server -m PATH/signals-Q8_0.gguf" in card
    assert "meanings" in card

    # The run knows where it went: its card and its page say how to run it.
    assert f"llama-server -m {out}/signals-Q8_0.gguf" in (run / "final" / "README.md").read_text()
    assert report([str(run), "--no-data"]) == 0
    page = (run / "report.html").read_text()
    assert 'href="#run"' in page
    assert f"{out}/signals-Q8_0.gguf" in page

    label = "best" if (run / "eval" / "best" / "meanings.jsonl").is_file() else "after"
    answered = [json.loads(line) for line in (run / "eval" / label / "meanings.jsonl").read_text().splitlines()]
    right = next(one for one in answered if one["scores"]["exact_match"] == 1.0)
    question = right["row"]["messages"][0]["content"]
    asked = [sys.executable, "-m", "distft.cli", "chat", str(run), "--base", "--prompt", question, "--json"]
    done = subprocess.run([*asked, "--max-new-tokens", "8"], capture_output=True, text=True, check=True)
    answers = {answer["model"]: answer for answer in json.loads(done.stdout)["answers"]}
    assert answers["tuned"]["text"] == right["answer"], "chat answers as the run's own evaluation did"
    assert answers["tuned"]["ended"]
    assert answers["base"]["text"] != right["answer"]


def test_a_level_that_loses_the_gain_fails_with_the_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level that rounds to nothing, within a bound that lets it pass: the task's own score has to stop it."""
    import gguf
    import numpy as np

    from distft.export_formats import gguf_file

    quantize = gguf.quantize

    def coarse(values: np.ndarray, quant: gguf.GGMLQuantizationType) -> np.ndarray:
        return quantize(np.round(values * 2) / 2 if quant.name == "Q4_0" else values, quant)

    monkeypatch.setattr(gguf, "quantize", coarse)
    monkeypatch.setattr(gguf_file, "KL_BOUNDS", dict(gguf_file.KL_BOUNDS) | {"Q4_0": 1e9})
    out = tmp_path / "exports" / "out"
    assert main([str(run), "--as", "gguf", "--level", "Q4_0", "--max-drop", "0.2", "--out", str(out)]) == 5
    message = capsys.readouterr().err
    assert "lost more than 0.2 of the gain: Q4_0; nothing was kept" in message
    assert "level  MB" in message
    assert "meanings.exact_match" in message
    assert list(out.parent.iterdir()) == []


def test_a_checkpoint_is_exported_as_it_was(run: Path, tmp_path: Path) -> None:
    best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
    steps = sorted((run / "checkpoints").glob("step-*"))
    checkpoint = next(path for path in steps if int(path.name.removeprefix("step-")) != best)
    made = kit.export(checkpoint, tmp_path / "step", "--as", "safetensors", "--num-rows", "4")
    assert made["source"]["label"] == checkpoint.name
    assert all(check["ok"] for check in kit.checks(made).values())
    last = kit.export(run, tmp_path / "last", "--as", "safetensors", "--num-rows", "4")
    name = "model.safetensors"
    assert made["files"][name]["sha256"] != last["files"][name]["sha256"], "another state"
    adapter = kit.export(run, tmp_path / "adapter", "--as", "peft", "--num-rows", "4")
    assert kit.checks(adapter)["products"]["value"] < 1e-6


def test_rounding_is_fitted_to_the_run_s_own_training_rows(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from distft.export_formats.calibration import calibration
    from distft.export_formats.source import open_source

    found = calibration(open_source(str(run), tmp_path), None, 16)
    assert found is not None
    assert (found.origin, len(found.rows)) == ("the run's training rows", 16)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    first = json.loads((run.parents[1] / "train.jsonl").read_text().splitlines()[0])["messages"]
    text = tokenizer.decode(found.rows[0])
    assert all(message["content"] in text for message in first), "as it was trained: rendered, with its answer"
    assert found.to_json()["tokens"] == sum(map(len, found.rows))
