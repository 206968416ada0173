"""A file of each tool, scaled down: imported, checked and trained for real, on rows and a model that are here.

This file is also the program that does so: `python test_imported_runs.py PLAN.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from harness import ROOT, run

import distft
from distft.catalog import REGISTRIES
from distft.check import run_check
from distft.core.errors import DistftError
from distft.importers import IMPORTERS, ImportOptions, import_config
from distft.recipe import load_recipe

OVERRIDES = (
    *("model.init=random", "model.dtype=float32", "data.chat_template=plain"),
    *("train.max_steps=2", "train.epochs=", "log.console=off"),
)
"""Random weights of the embedded model, a template as it has none, and two steps; everything else is the file's."""
FILES = {
    "axolotl.yaml": """
base_model: demo:tiny-llama
load_in_4bit: true
adapter: qlora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
datasets:
  - path: FOLDER/alpaca.jsonl
    type: alpaca
test_datasets:
  - path: FOLDER/held.jsonl
    type: alpaca
eval_steps: 1
save_steps: 1
sequence_len: 128
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 1e-3
warmup_steps: 1
output_dir: FOLDER/runs/axolotl
""",
    "llama_factory.yaml": """
model_name_or_path: demo:tiny-llama
stage: dpo
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: pairs
template: default
cutoff_len: 96
pref_loss: ipo
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
lr_scheduler_type: linear
output_dir: FOLDER/runs/llama_factory
""",
    "axolotl-kto.yaml": """
base_model: demo:tiny-llama
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.5
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
datasets:
  - path: FOLDER/judged.jsonl
    type: chatml.ultra
chat_template: chatml
sequence_len: 128
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: constant
learning_rate: 1e-3
output_dir: FOLDER/runs/axolotl-kto
""",
    "trl.yaml": """
model_name_or_path: demo:tiny-llama
datasets:
  - path: json
    data_files: FOLDER/messages.jsonl
max_length: 128
packing: true
assistant_only_loss: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
lr_scheduler_type: constant
output_dir: FOLDER/runs/trl
""",
    "trl-grpo.yaml": """
model_name_or_path: demo:tiny-llama
datasets:
  - path: json
    data_files: FOLDER/prompts.jsonl
reward_funcs: [imported_rewards.short]
num_generations: 4
max_prompt_length: 64
max_completion_length: 8
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
lr_scheduler_type: constant
output_dir: FOLDER/runs/trl-grpo
""",
    "torchtune.yaml": """
output_dir: FOLDER/runs/torchtune
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: True
  lora_rank: 4
  lora_alpha: 8
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 128
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: demo:tiny-llama
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: FOLDER/alpaca.jsonl
  column_map: {input: instruction, output: output}
batch_size: 4
gradient_accumulation_steps: 1
epochs: 1
optimizer:
  _component_: torch.optim.AdamW
  lr: 1e-3
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
""",
    "openai.json": json.dumps(
        {
            "model": "demo:tiny-llama",
            "training_file": "FOLDER/messages.jsonl",
            "suffix": "openai",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 4, "n_epochs": 1}}},
        },
        indent=1,
    ),
}
REWARD = """
def short(prompts, completions, wanted, **columns):
    return [-abs(len(completion[0]["content"]) - length) / 10 for completion, length in zip(completions, wanted)]
"""
"""As TRL's trainer calls it."""
EXPECTED = {
    "axolotl": ("sft", "qlora", 4),
    "axolotl-kto": ("kto", "lora", 4),
    "llama_factory": ("dpo", "lora", 4),
    "trl": ("sft", "full", 4),
    "trl-grpo": ("grpo", "full", 4),
    "torchtune": ("sft", "lora", 4),
    "openai": ("sft", "lora", 4),
}
"""Stem of the file -> objective, method and global batch."""


def main(plan: Path) -> None:
    """Import, check and train each file of the plan: the run folder, or what is wrong."""
    said = {}
    for file in map(Path, json.loads(plan.read_text())):
        overrides = OVERRIDES
        if file.suffix == ".json":  # the API has no folder of runs, and no length that rows are cut to
            overrides += (f'output_dir="{file.parent}/runs"', "data.max_length=128", "train.micro_batch_size=2")
        try:
            made = import_config(
                file, importers=IMPORTERS, registries=REGISTRIES, options=ImportOptions(overrides=overrides)
            )
            recipe = load_recipe(_write(file, made.toml), registries=REGISTRIES)
            report = run_check(recipe, samples=1)
            folder = distft.train(distft.load_recipe(file.with_suffix(".toml"))).folder
            rows = sum(split.num_rows for split in report.splits if split.split == "train")
            said[file.stem] = {"folder": str(folder), "rows": rows}
        except DistftError as error:
            said[file.stem] = str(error)
    print(json.dumps(said))


def _write(file: Path, toml: str) -> Path:
    path = file.with_suffix(".toml")
    path.write_text(toml, encoding="utf-8")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("imported")
    words = ("disk full", "login slow", "cache cold", "deploy failed", "queue long", "region down")
    asked = [(f"What about {word} {number}?", f"Look at {word} first.") for number, word in enumerate(words * 4)]
    rows = {
        "alpaca.jsonl": [{"instruction": ask, "input": "", "output": answer} for ask, answer in asked],
        "held.jsonl": [{"instruction": f"{ask} Now?", "input": "", "output": answer} for ask, answer in asked[:4]],
        "messages.jsonl": [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for ask, answer in asked
        ],
        "prompts.jsonl": [{"prompt": [{"role": "user", "content": ask}], "wanted": 20} for ask, _ in asked],
        "judged.jsonl": [
            {"prompt": ask, "completion": answer, "label": place % 2 == 0} for place, (ask, answer) in enumerate(asked)
        ],
        "pairs.json": [
            {
                "conversations": [{"from": "human", "value": ask}],
                "chosen": {"from": "gpt", "value": answer},
                "rejected": {"from": "gpt", "value": "No idea."},
            }
            for ask, answer in asked
        ],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "pairs.json").write_text(json.dumps(rows["pairs.json"]))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
    plan = folder / "plan.json"
    plan.write_text(json.dumps([str(folder / name) for name in FILES]))
    (folder / "imported_rewards.py").write_text(REWARD)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), str(folder)])
    done = run([sys.executable, __file__, str(plan)], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stem", EXPECTED)
def test_an_imported_recipe_is_checked_and_trained(said: dict[str, dict[str, str]], stem: str) -> None:
    assert isinstance(said[stem], dict), said[stem]
    assert said[stem]["rows"] == 24
    folder = Path(said[stem]["folder"])
    assert folder.parts[-2:] == ("runs", stem)
    recipe = load_recipe(folder / "recipe.toml", registries=REGISTRIES)
    assert (recipe.objective.name, recipe.method.name, recipe.train.global_batch_size) == EXPECTED[stem]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    if stem == "trl-grpo":  # the sum of advantages of one policy is zero: its gradient is not
        assert all(line["grad_norm"] > 0 and -30 < line["reward_trl_function"] < 0 for line in lines if "loss" in line)
    else:
        assert all(0 < loss < 100 for loss in losses)
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    assert any(path.suffix == ".safetensors" for path in (folder / "final").iterdir())
    if stem == "axolotl":
        assert sum("eval_loss" in line for line in lines) >= 2
        assert (folder / "checkpoints" / "step-00000001").is_dir()
