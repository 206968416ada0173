"""`distft import`: where the recipe goes, what is never overwritten, and what is said on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = """\
base_model: demo:tiny-llama
datasets:
  - path: rows.jsonl
    type: chat_template
micro_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 1e-4
val_set_size: 0.1
wheels: 4
"""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distft.import", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lora.yaml"
    path.write_text(TEXT)
    return path


def test_the_recipe_goes_to_standard_output_and_remarks_to_both(file: Path) -> None:
    done = run(file, "--gpus", "2", "--set", "train.epochs=2.5")
    assert done.returncode == 0, done.stderr
    assert "global_batch_size = 8" in done.stdout
    assert "epochs = 2.5" in done.stdout
    for text in (done.stdout, done.stderr):
        assert "val_set_size = 0.1  no rows are held out by chance" in text
        assert "wheels = 4" in text
    assert "a file of Axolotl" in done.stderr
    assert "next: distft check RECIPE" in done.stderr


def test_a_file_is_written_once_and_overwritten_by_force_alone(file: Path, tmp_path: Path) -> None:
    to = tmp_path / "recipes" / "mine.toml"
    assert run(file, "--to", to).returncode == 0
    first = to.read_text()
    assert 'path = "demo:tiny-llama"' in first
    again = run(file, "--to", to, "--gpus", "4")
    assert again.returncode == 8
    assert "exists, and was not overwritten  name another file, or say --force" in again.stderr
    assert to.read_text() == first
    assert run(file, "--to", to, "--gpus", "4", "--force").returncode == 0
    assert "global_batch_size = 16" in to.read_text()
    folder = run(file, "--to", tmp_path)
    assert folder.returncode == 8
    assert "is a folder  name a file" in folder.stderr


def test_a_refused_file_writes_nothing_and_ends_with_2(file: Path, tmp_path: Path) -> None:
    file.write_text(TEXT + "neftune_noise_alpha: 5\n")
    done = run(file, "--to", tmp_path / "never.toml")
    assert done.returncode == 2
    assert "line 10  neftune_noise_alpha = 5  NEFTune" in done.stderr
    assert not (tmp_path / "never.toml").exists()
    assert run(tmp_path / "nothing.yaml").returncode == 2


def test_json_holds_everything(file: Path) -> None:
    done = run(file, "--json")
    said = json.loads(done.stdout)
    assert said["tool"] == "axolotl"
    assert [one["key"] for one in said["left"]] == ["val_set_size"]
    assert [(one["key"], one["line"]) for one in said["unknown"]] == [("wheels", 9)]
    assert "train.global_batch_size" in said["changed"]
    assert said["toml"].startswith("# Made by `distft import` of lora.yaml")
