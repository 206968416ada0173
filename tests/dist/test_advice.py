"""A recipe that does not fit, the planner's advice followed, and a run within a memory limit set on the process."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, environment
from transformers import LlamaConfig

GIB = 2**30
LIMIT_GIB = 1.6
RECIPE = """
name = "large"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
tokenizer = "demo:tiny-llama"
init = "random"
dtype = "float32"
[data]
max_length = 512
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/rows.jsonl"
format = "text"
[train]
max_steps = 1
global_batch_size = 16
micro_batch_size = 16
activation_checkpointing = "off"
[engine]
name = "solo"
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ).save_pretrained(folder / "model")  # fmt: skip
    text = " ".join(["disk queue login payments region timeout cache"] * 3)  # packs to 98 % of a sequence
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(400)))
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def limited(recipe: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run whose private memory ends at the limit. Blocks go back to the system when they are freed: else glibc keeps
    them, and what is counted is its heap's history."""
    command = [sys.executable, "-m", "distft.train", str(recipe), "--set", f'name="{name}"']
    for override in overrides:
        command += ["--set", override]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env=environment(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="131072"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(LIMIT_GIB * GIB), -1)),
    )  # fmt: skip


def planned(recipe: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "distft.plan", str(recipe), "--gpu", str(LIMIT_GIB), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)["cases"][0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous maps on Linux only")
def test_what_does_not_fit_fails_and_each_kind_of_advice_helps(recipe: Path) -> None:
    case = planned(recipe)
    assert not case["fits"]
    assert case["changes"]
    refused = limited(recipe, "as-it-is")
    assert refused.returncode == 9, refused.stderr[-2000:]
    assert "memory ran out in the forward of step 1" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "train.micro_batch_size=1" in refused.stderr
    kinds = {change["set"][0].split("=")[0]: change for change in reversed(case["changes"]) if len(change["set"]) == 1}
    for key in ("train.micro_batch_size", "train.activation_checkpointing"):
        change = kinds[key]
        done = limited(recipe, key.split(".")[1], *change["set"])
        assert done.returncode == 0, (change, done.stderr[-2000:])
