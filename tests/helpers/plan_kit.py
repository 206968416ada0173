"""Configs of real shapes, written here: no file of a real model is needed."""

import json
import os
from pathlib import Path
from typing import Any

from distft.catalog import REGISTRIES
from distft.plan import inventory
from distft.plan.inventory import Inventory
from distft.recipe import Recipe, parse_recipe

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                        "num_attention_heads": 64}  # fmt: skip
SMALL = LLAMA_8B | {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 5, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "vocab_size": 515}  # fmt: skip


def note_row(*cells: object) -> None:
    """A line of Markdown in the file that DISTFT_PLAN_TABLE names, if it names one: the tables of docs/results."""
    if "DISTFT_PLAN_TABLE" in os.environ:
        with Path(os.environ["DISTFT_PLAN_TABLE"]).open("a", encoding="utf-8") as file:
            print("|", " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in cells), "|", file=file)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe_text(model: Path, **tables: str) -> str:
    train = tables.get("train", "max_steps = 100\nglobal_batch_size = 64")
    more = "".join(f"[{name}]\n{body}\n" for name, body in tables.items() if name not in ("train", "data"))
    return (
        f'name = "planned"\n[model]\npath = "{model}"\n[data]\nmax_length = 4096\n{tables.get("data", "")}\n'
        f'[[data.train]]\npath = "nowhere.jsonl"\n[train]\n{train}\n{more}'
    )


def recipe_of(model: Path, *overrides: str) -> Recipe:
    return parse_recipe(recipe_text(model), source="planned", registries=REGISTRIES, overrides=overrides)


def read(recipe: Recipe) -> Inventory:
    head = recipe.objective.spec.head_of(recipe.objective.params)
    return inventory.read(recipe.model, Path(recipe.model.path), recipe.method.spec, recipe.method.params, head=head)


CRITIC = (
    'objective={name="ppo", critic="own"}', "data.packing=false",
    'rollout={answers_per_prompt=2, max_new_tokens=64, rewards=[{name="exact_match"}]}',
)  # fmt: skip
"""Of a recipe whose critic is a model of its own."""
