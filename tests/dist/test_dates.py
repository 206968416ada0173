"""A run whose chat template writes the date: stopped, and continued on another day with another cache folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chat_templates as shapes
import pytest

SCRIPT = """
import os, sys
import pytest
from distft import load_recipe, train
from distft.data import fingerprint, prepare

day, recipe, *overrides = sys.argv[1:]
for module in (fingerprint, prepare):
    module.today = lambda: day
train(load_recipe(recipe, overrides=overrides), allow_changes=True)
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
RECIPE = """name = "{name}"
output_dir = "runs"
model = {{ path = "model", init = "random", dtype = "float32" }}
data = {{ max_length = 128, packing = false, train = [{{ path = "train.jsonl" }}] }}
schedule = {{ name = "constant" }}
train = {{ max_steps = 4, global_batch_size = 2, micro_batch_size = 1 }}
engine = {{ name = "solo" }}
checkpoint = {{ every_steps = 1 }}
log = {{ tensorboard = false }}
"""


def start(folder: Path, name: str, day: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    recipe = folder / f"{name}.toml"
    recipe.write_text(RECIPE.format(name=name))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DISTFT_CACHE": str(folder / f"cache-{day}")}
    command = [sys.executable, "-c", SCRIPT, day, str(recipe), *overrides]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.slow  # nothing of it depends on several processes but the launch
def test_a_run_that_goes_on_tomorrow_trains_on_the_same_rows(tmp_path: Path) -> None:
    model = shapes.save_tokenizer(tmp_path / "model", shapes.LLAMA31)
    (model / "config.json").write_text(json.dumps(CONFIG))
    rows = [
        {"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]}
        for n in range(8)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = start(tmp_path, "whole", "2026-01-31")
    assert whole.returncode == 0, whole.stderr
    first = start(tmp_path, "cut", "2026-01-31", "train.max_steps=2")
    assert first.returncode == 0, first.stderr
    (tmp_path / "runs/cut/exit.json").unlink()  # as if it had been killed
    second = start(tmp_path, "cut", "2026-02-01")
    assert "continuing" in second.stderr, second.stderr
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    for name in ("whole", "cut"):
        assert json.loads((tmp_path / "runs" / name / "manifest.json").read_text())["date"] == "2026-01-31"
    other = start(tmp_path, "other", "2026-02-01")
    assert other.returncode == 0, other.stderr
    assert losses(tmp_path, "other") != losses(tmp_path, "whole"), "the day is in the rows"
