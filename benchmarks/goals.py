"""Tokens per second on one GPU against the goals, from random weights of the real configs; one command, resumable.

    python benchmarks/goals.py --configs FOLDER [--minutes 8] [--only llama8b-lora] [--out DIR]
    python benchmarks/goals.py --tiny                    # the same script end to end on any machine, in a minute

FOLDER holds the models' config.json files, as Llama-3.1-8B.json or Llama-3.1-8B/config.json. Each goal is a case of
`distft bench` in a fresh process over full-length mock rows, beside its plan; what the plan says cannot fit is not
started. DIR/goals.json has the figures, and in DIR/NAME/ lie the records. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kit


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A case and the rate it should reach on an H200."""

    config: str
    method: str
    length: int
    tokens_per_s: int
    """The goal, and beside it in a comment the best that is published."""
    settings: tuple[str, ...] = ()
    least_share_of: tuple[str, float] | None = None
    """Another goal's name, and the least share of its rate that this one should reach beside its own goal."""


GOALS = {
    "qwen0.5b-full": Goal(config="Qwen2.5-0.5B", method="full", length=4096, tokens_per_s=125_000),
    "llama8b-lora": Goal(config="Llama-3.1-8B", method="lora", length=4096, tokens_per_s=15_000),  # 12,473 NeMo, H100
    "llama8b-lora-8k": Goal(config="Llama-3.1-8B", method="lora", length=8192, tokens_per_s=15_000),  # QLoRA's measure
    "llama8b-qlora": Goal(
        config="Llama-3.1-8B",
        method="qlora",
        length=8192,
        tokens_per_s=14_200,
        least_share_of=("llama8b-lora-8k", 0.95),
    ),
    "qwen7b-lora": Goal(config="Qwen2.5-7B", method="lora", length=4096, tokens_per_s=16_500),  # 14,110 NeMo, H100
    "llama8b-full": Goal(
        config="Llama-3.1-8B",
        method="full",
        length=4096,
        tokens_per_s=10_500,  # 10,471 KempnerForge, H200
        settings=('train.activation_checkpointing="full"',),
    ),
    "llama8b-full-kept": Goal(
        config="Llama-3.1-8B",
        method="full",
        length=4096,
        tokens_per_s=12_200,  # 6,667 at 8k, torchtitan, 8 x H100
        # Moments of fp32 leave no room for all activations on one card.
        settings=('train.activation_checkpointing="off"', 'optim.name="adamw_8bit"'),
    ),
    "llama70b-qlora": Goal(config="Llama-3.1-70B", method="qlora", length=4096, tokens_per_s=1_200),  # 275 Qwen, A100
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
RECIPE = """
name = "{name}"
output_dir = "{folder}/runs"
[model]
path = "{folder}/{name}"
init = "random"
dtype = "{dtype}"
[method]
name = "{method}"
[data]
max_length = {length}
[[data.train]]
path = "mock rows: never read"
format = "text"
[optim]
name = "adamw"
[train]
max_steps = 1000
global_batch_size = {batch}
compile = {compile}
[engine]
name = "solo"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--configs", type=Path, help="folder of config.json files")
    options.add_argument("--only", choices=GOALS, action="append")
    options.add_argument("--minutes", type=float, default=8.0, help="no case is started after this")
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--warmup", type=int, default=5)
    options.add_argument("--tiny", action="store_true", help="a model of two blocks instead of each, in fp32")
    options.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", tempfile.gettempdir())) / "goals")
    asked = options.parse_args()
    if not asked.tiny and asked.configs is None:
        options.error("--configs FOLDER, or --tiny")
    asked.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * asked.minutes
    found: list[dict[str, Any]] = []
    for name in asked.only or GOALS:
        said = measure(name, GOALS[name], asked) if time.monotonic() < ends else {"note": "not started: out of time"}
        found.append({"name": name, "goal_tokens_per_s": GOALS[name].tokens_per_s} | said)
        found[-1] |= beside(GOALS[name], found)
        print(json.dumps(found[-1]), file=sys.stderr)
        kit.finish({"benchmark": "goals", "tiny": asked.tiny, "goals": found}, str(asked.out / "goals.json"))


def beside(goal: Goal, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Its rate as a share of the other goal's that it is held against, where both were measured."""
    if goal.least_share_of is None:
        return {}
    other, least = goal.least_share_of
    rates = {one["name"]: one["tokens_per_s"] for one in found if "tokens_per_s" in one}
    own = found[-1].get("tokens_per_s")
    if other not in rates or own is None:
        return {}
    return {"share_of": {"name": other, "share": own / rates[other], "least": least}}


def recipe_text(name: str, goal: Goal, folder: Path, *, tiny: bool) -> str:
    """The recipe of a goal's case."""
    return RECIPE.format(
        name=name,
        folder=folder,
        method=goal.method,
        length=64 if tiny else goal.length,
        batch=2 if tiny else 32,
        dtype="float32" if tiny else "bfloat16",
        compile=str(not tiny).lower(),
    )


def measure(name: str, goal: Goal, asked: argparse.Namespace) -> dict[str, Any]:
    folder = asked.out / "inputs"
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config(goal, asked)), encoding="utf-8")
    recipe = folder / f"{name}.toml"
    recipe.write_text(recipe_text(name, goal, folder, tiny=asked.tiny), encoding="utf-8")
    command = [sys.executable, "-m", "distft.bench", str(recipe), "--rows", "full", "--json", "--timeout-s", "300"]
    command += ["--output", str(asked.out / name)]
    command += ["--steps", str(2 if asked.tiny else asked.steps), "--warmup", str(1 if asked.tiny else asked.warmup)]
    for override in goal.settings:
        command += ["--set", override]
    env = os.environ | {"PYTHONPATH": str(kit.ROOT), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    try:
        [record] = json.loads(done.stdout)["records"]
    except (ValueError, KeyError):
        return {"note": f"distft bench ended with {done.returncode}"}
    if record["outcome"] != "measured":
        return {"note": f"{record['outcome']}: {record['reason']}", "record": record}
    rate = record["speed"]["tokens_per_s"]
    return {"tokens_per_s": rate, "share_of_goal": None if asked.tiny else rate / goal.tokens_per_s, "record": record}


def config(goal: Goal, asked: argparse.Namespace) -> dict[str, Any]:
    """The model's config, as a file or a folder of that name."""
    if asked.tiny:
        return TINY
    places = [asked.configs / f"{goal.config}.json", asked.configs / goal.config / "config.json"]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise SystemExit(f"neither {places[0]} nor {places[1]} is there")
    return json.loads(place.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
