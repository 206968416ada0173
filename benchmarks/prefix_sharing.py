"""What it saves to compute a pair's prompt once for both answers: the same steps with and without, in turn.

    python benchmarks/prefix_sharing.py --rows PAIRS --tokenizer FOLDER [--config FILE.json] [--method full|lora]

Blocks of steps A B B A ... of one DPO run each, over the same packed sequences of the same rows; a Llama of --config's
widths (without it 8 blocks of width 256) with random weights, fp32. Ratios of medians, and of the tokens that were
computed. The head is computed for answers only, so what is saved depends on the vocabulary's share of the model: take
the config of a model that is trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import kit

RECIPE = """
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
tokenizer = "{tokenizer}"
init = "random"
dtype = "float32"
[objective]
name = "dpo"
[data]
max_length = {length}
cache_dir = "{folder}/cache"
{data}
[[data.train]]
path = "{rows}"
format = "preference"
[optim]
learning_rate = 1e-5
[schedule]
name = "constant"
[train]
max_steps = 10000
global_batch_size = 2
micro_batch_size = 1
[engine]
name = "solo"
[log]
tensorboard = false
console = "off"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", required=True)
    options.add_argument("--tokenizer", required=True)
    options.add_argument("--data", default="", help="further lines of [data]")
    options.add_argument("--config", help="config.json whose widths and vocabulary the Llama has")
    options.add_argument("--blocks", type=int, help="number of blocks")
    options.add_argument("--method", default="full", choices=("full", "lora"))
    options.add_argument("--length", type=int, default=1024, help="max_length")
    options.add_argument("--rounds", type=int, default=6, help="pairs of blocks")
    options.add_argument("--steps", type=int, default=3, help="optimizer steps in a block")
    options.add_argument("--out")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as text:
        kit.finish({"benchmark": "prefix_sharing"} | measure(Path(text), asked), asked.out)


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Both runs in turn, from one set of weights over one stream of rows."""
    from transformers import AutoTokenizer

    from distft.demo import locate_path

    tokenizer = locate_path(asked.tokenizer)
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }
    if asked.config:
        config = json.loads(Path(asked.config).read_text(encoding="utf-8"))
        shape = {key: config[key] for key in (*shape, "vocab_size")}
    if asked.blocks:
        shape["num_hidden_layers"] = asked.blocks
    kit.write_config(folder / "model", shape | {"vocab_size": shape.get("vocab_size", -(-vocabulary // 64) * 64)})
    given = {"folder": folder, "tokenizer": tokenizer, "rows": asked.rows, "length": asked.length, "data": asked.data}
    recipe = folder / "recipe.toml"
    recipe.write_text('name = "run"\n' + RECIPE.format(**given), encoding="utf-8")
    method = ['method={name="lora", r=16}'] if asked.method == "lora" else []
    runs: dict[bool, kit.Run] = {}
    for shares in (False, True):
        own = [f'name="{shares}"', f"data.prefix_sharing={str(shares).lower()}"]
        runs[shares] = kit.Run(recipe_file=recipe, overrides=[*method, *own])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for run in runs.values():
        run.go(1)
    tokens = {shares: run.state.tokens for shares, run in runs.items()}
    for number in range(asked.rounds):
        for shares in (False, True) if number % 2 else (True, False):
            began = time.perf_counter()
            runs[shares].go(asked.steps)
            seconds[shares].append((time.perf_counter() - began) / asked.steps)
    computed = {shares: run.state.tokens - tokens[shares] for shares, run in runs.items()}
    apart, shared = (kit.quantiles(seconds[shares]) for shares in (False, True))
    return {
        "rows": Path(asked.rows).name,
        "model": {key: shape[key] for key in ("hidden_size", "num_hidden_layers")},
        "method": asked.method,
        "tokens_ratio": computed[False] / computed[True],
        "step_ratio": apart["median"] / shared["median"],
        "step_s": {"apart": apart, "shared": shared},
    }


if __name__ == "__main__":
    main()
