"""How long a save blocks training: in the background against in the foreground, on one machine, interleaved.

    python benchmarks/checkpoint.py [--engine zero3] [--nproc 2] [--hidden 512] [--out FILE.json]

Both runs train the same model of random weights; their `saved` events carry seconds that training waited.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = """
name = "bench"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
tokenizer = "demo:tiny-llama"
init = "random"
dtype = "float32"
[data]
max_length = 64
loss_on = "completion"
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/rows.jsonl"
[optim]
learning_rate = 1e-4
[train]
max_steps = {steps}
global_batch_size = {batch}
micro_batch_size = 1
[checkpoint]
every_steps = 3
keep = 2
[log]
tensorboard = false
console = "off"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", default="zero3")
    options.add_argument("--nproc", type=int, default=2)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--rounds", type=int, default=2, help="pairs of runs; order A B B A …")
    options.add_argument("--out")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, asked)
        blocked: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
        size = 0
        order = ["synchronous", "asynchronous"]
        for number in range(asked.rounds):
            for kind in order if number % 2 == 0 else reversed(order):
                saved = launch(folder, f"{kind}-{number}", kind == "asynchronous", asked)
                blocked[kind] += [event["blocked_s"] for event in saved[1:]]  # the first warms up
                size = saved[-1]["bytes"]
    medians = {kind: statistics.median(times) for kind, times in blocked.items()}
    result = {
        "what": "seconds a save blocks training, median",
        "engine": asked.engine,
        "nproc": asked.nproc,
        "checkpoint_bytes": size,
        "saves": {kind: len(times) for kind, times in blocked.items()},
        "median_s": medians,
        "ratio": medians["asynchronous"] / medians["synchronous"],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if asked.out:
        Path(asked.out).write_text(text + "\n")


def prepare(folder: Path, asked: argparse.Namespace) -> None:
    """Model config and rows."""
    (folder / "model").mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": asked.hidden,
        "intermediate_size": asked.hidden * 3,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16_000,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    (folder / "model/config.json").write_text(json.dumps(config))
    row = json.dumps({"prompt": "queue slow:", "completion": " cache cache region timeout"})
    (folder / "rows.jsonl").write_text((row + "\n") * 200)
    recipe = RECIPE.format(folder=folder, steps=asked.steps, batch=asked.nproc)
    (folder / "recipe.toml").write_text(recipe)


def launch(folder: Path, name: str, background: bool, asked: argparse.Namespace) -> list[dict]:
    """One run in processes of its own; its `saved` events."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    command += ["localhost:0", "--nproc-per-node", str(asked.nproc), "-m", "distft.train", str(folder / "recipe.toml")]
    for setting in (
        f'name="{name}"',
        f'engine.name="{asked.engine}"',
        f"checkpoint.asynchronous={str(background).lower()}",
    ):
        command += ["--set", setting]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    lines = (folder / "runs" / name / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "saved"]


if __name__ == "__main__":
    main()
