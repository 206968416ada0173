"""The first step's loss of the main job is transformers' own, for models whose arithmetic differs from Llama's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXTS, documents, loss_of, model_folder, page, proven

THIRTY = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "granite",
    "gpt_oss",
    "cohere2",
    "phi3",
    "olmo2",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "falcon",
    "stablelm",
    "nemotron",
    "bloom",
    "mpt",
    "opt",
    "lfm2",
    "qwen3_next",
    "falcon_h1",
    "mamba",
    "jamba",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "llama4_text",
    "modernbert-decoder",
)
ALIKE = (
    "falcon",
    "falcon_h1",
    "gemma4_text",
    "glm4",
    "gpt_neox",
    "jamba",
    "lfm2",
    "modernbert-decoder",
    "mpt",
    "nemotron",
    "olmo2",
    "opt",
    "phi3",
    "qwen3_next",
    "stablelm",
)
"""Like another that is cheaper, or slow: `make test-all` trains them."""
ON_THE_PAGE = ("llama", "gemma2", "gpt_oss", "bloom", "gptj", "lfm2", "mamba", "mixtral", "opt")
"""What `make test` proves anew; the others as `make test-all` proves the whole page."""
RTOL = 1e-5
SEQUENCES = 2
"""Of 64 tokens, that all texts fill when packed."""
SLIDING = ["sliding_attention", "full_attention"]
FEWER_BLOCKS: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 2, "layer_types": SLIDING},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "gemma3_text": {"num_hidden_layers": 2, "layer_types": SLIDING},
    "gemma4_text": {"num_hidden_layers": 2, "layer_types": SLIDING},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    "qwen3_next": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
"""The same kinds of blocks after each other, that training takes seconds."""


FOUR = (("full", True), ("full", False), ("lora", True), ("lora", False))
"""Method, and whether rows are packed."""
HALVES = (FOUR[::3], FOUR[1:3])
"""Each method once, each packing once: what `make test` runs, in turns."""


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        *(
            pytest.param(kind, HALVES[number % 2], id=kind, marks=[pytest.mark.slow] if kind in ALIKE else [])
            for number, kind in enumerate(THIRTY)
        ),
        *(
            pytest.param(kind, HALVES[1 - number % 2], id=f"{kind}-other", marks=pytest.mark.slow)
            for number, kind in enumerate(THIRTY)
        ),
    ],
)
def test_first_loss_and_final_folder_are_those_of_transformers(
    kind: str, runs: tuple[tuple[str, bool], ...], tmp_path: Path
) -> None:
    """Packed and not, full and LoRA: the step's loss is the base's, the last evaluation's is that of final/."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = model_folder(kind, tmp_path / "base", **FEWER_BLOCKS.get(kind, {}))
    for name in ("rows", "same"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = documents(folder)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    right = loss_of(base(), rows)
    for method, packing in runs:
        run = train_once(tmp_path, method=method, packing=packing)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first = next(line["loss"] for line in lines if "loss" in line)
        assert first == pytest.approx(right, rel=RTOL), (method, packing)
        last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
        assert abs(last - right) > 1e-4 * right, "the step changed nothing"
        if method == "full":
            lm = AutoModelForCausalLM.from_pretrained(run / "final", attn_implementation="eager", dtype=torch.float32)
        else:
            lm = PeftModel.from_pretrained(base(), run / "final")
        assert loss_of(lm, rows) == pytest.approx(last, rel=RTOL), (method, packing)


def train_once(tmp_path: Path, *, method: str, packing: bool, model: str = "", **more: str) -> Path:
    """Run the main job for one step in this process; the run folder."""
    from distft import load_recipe, train

    name = f"{method}-{'packed' if packing else 'rows'}"
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(f"""
name = "{name}"
output_dir = "{tmp_path}/runs"
[model]
path = "{tmp_path}/base"
dtype = "float32"
{model}
[method]
name = "{method}"
[data]
packing = {str(packing).lower()}
max_length = 64
cache_dir = "{tmp_path}/cache"
[[data.train]]
path = "{tmp_path}/rows.jsonl"
format = "text"
[[data.eval]]
path = "{tmp_path}/same.jsonl"
format = "text"
[optim]
name = "adamw"
learning_rate = 1e-2
[train]
max_steps = 1
global_batch_size = {SEQUENCES if packing else len(TEXTS)}
[eval]
at_start = false
[engine]
name = "solo"
[log]
tensorboard = false
console = "off"
""")
    return train(load_recipe(recipe), resume="never").folder


@pytest.mark.slow
def test_the_page_of_architectures_is_true() -> None:
    """Every causal language model of the installed transformers, proven anew."""
    kept = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
    assert page() == kept.read_text(encoding="utf-8"), "make architectures"


@pytest.mark.parametrize("kind", ON_THE_PAGE)
def test_the_page_says_what_the_proof_finds(kind: str) -> None:
    """The fast part of the same, for what is trained above."""
    kept = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    verdict = proven(kind)
    assert verdict.path is not None
    rest = verdict.path.describe()
    assert f"| {verdict.architecture} | {kind} |{f' {rest} |' if rest else ''}\n" in kept
