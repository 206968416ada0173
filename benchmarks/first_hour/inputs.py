"""Models, rows and recipes of the first hour: configs written here, random weights, nothing downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import goals

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN = LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}


def _sized(base: dict[str, Any], hidden: int, inner: int, blocks: int, heads: int, groups: int, words: int) -> Any:
    return base | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
    }


CONFIGS = {
    "Llama-3.1-8B": _sized(LLAMA, 4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": _sized(LLAMA, 8192, 28672, 80, 64, 8, 128256),
    "Qwen2.5-0.5B": _sized(QWEN, 896, 4864, 24, 14, 2, 151936) | {"tie_word_embeddings": True},
    "Qwen2.5-7B": _sized(QWEN, 3584, 18944, 28, 28, 4, 152064),
    "two-wide-blocks": _sized(LLAMA, 4096, 14336, 2, 32, 8, 32768),
}
"""Shapes that the makers publish, and one in which adapters are large enough to be paged."""
TRAINED = {
    True: _sized(LLAMA, 64, 160, 2, 4, 2, 1024),
    False: _sized(LLAMA, 512, 1408, 4, 8, 2, 1024),
}
"""What the phases train that compare one run with another: at toy size, and on a GPU."""
TRAIN_RECIPE = """
name = "{name}"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
dtype = "float32"
[data]
max_length = 96
loss_on = "completion"
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/train.jsonl"
[optim]
learning_rate = 1e-3
[schedule]
name = "cosine"
warmup_steps = 2
[train]
max_steps = 6
global_batch_size = 8
micro_batch_size = 2
deterministic = true
[engine]
name = "solo"
[checkpoint]
every_steps = 3
asynchronous = false
[log]
tensorboard = false
console = "off"
"""
STEPS = 6


def bench_recipe(folder: Path, config: str, *, toy: bool, method: str, length: int, batch: int, compiled: bool) -> Path:
    """A recipe for `distft bench` over mock rows, in the form that benchmarks/goals.py has."""
    name = f"{config}-{method}-{length}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    model = goals.TINY if toy else CONFIGS[config]
    (folder / name / "config.json").write_text(json.dumps(model), encoding="utf-8")
    values = {"name": name, "folder": folder, "method": method, "length": 64 if toy else length}
    values |= {
        "batch": 2 if toy else batch,
        "dtype": "float32" if toy else "bfloat16",
        "compile": str(compiled).lower(),
    }
    path = folder / f"{name}.toml"
    path.write_text(goals.RECIPE.format(**values), encoding="utf-8")
    return path


def train_recipe(folder: Path, *, toy: bool) -> Path:
    """A recipe for `distft.train`: a small model with weights and a tokenizer, and rows of different lengths."""
    import kit
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distft.demo.files import locate_path

    path = folder / "train.toml"
    if path.is_file():
        return path
    model = folder / "model"
    torch.manual_seed(7)
    config = AutoConfig.for_model(**TRAINED[toy], bos_token_id=None, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((Path(locate_path("demo:tiny-llama")) / name).read_bytes())
    rng = random.Random(3)

    def some(most: int) -> str:
        return " ".join(rng.choice(kit.WORDS) for _ in range(rng.randint(1, most)))

    rows = [{"prompt": some(22) + ":", "completion": " " + some(30)} for _ in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path.write_text(TRAIN_RECIPE.format(name="train", folder=folder), encoding="utf-8")
    return path
