"""Whatever a key of a file holds: a recipe that loads comes out, or a mistake that is told; never a traceback."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_kit import loaded, made

from distft.core.errors import RecipeError

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, "", "text", "a,b", [], ["a"], [1], [None], {}, {"a": {"b": [1]}}, 10**30, float("inf"),
)  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "axolotl": {
        "base_model": "a/b",
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"},
        "sequence_len": 512,
        "datasets": [
            {
                "path": "c/d",
                "type": "chat_template",
                "field_messages": "m",
                "split": "train[:9]",
                "message_property_mappings": {"role": "role", "content": "content"},
                "roles_to_train": ["assistant"],
            }
        ],
        "test_datasets": [{"path": "e.jsonl", "type": {"field_instruction": "q", "field_output": "a"}}],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "learning_rate": "1e-4",
        "warmup_ratio": 0.1,
        "deepspeed": "zero3.json",
        "fsdp": ["full_shard"],
        "fsdp_config": {"offload_params": True},
        "eval_steps": 5,
        "save_steps": 5,
        "bf16": "auto",
        "output_dir": "out",
        "wandb_project": "p",
        "special_tokens": {},
    },
    "llama_factory": {
        "model_name_or_path": "a/b",
        "stage": "dpo",
        "pref_loss": "sigmoid",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "quantization_bit": 4,
        "dataset": "pairs",
        "dataset_dir": "data",
        "template": "llama3",
        "cutoff_len": 512,
        "max_samples": 5,
        "warmup_steps": 3,
        "report_to": "wandb",
        "output_dir": "out",
        "max_steps": 9,
        "parallelism_config": {"cp_size": 1},
    },
    "trl": {
        "model_name_or_path": "a/b",
        "dataset_name": "c/d",
        "use_peft": True,
        "lora_target_modules": ["q_proj"],
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.1,
        "max_length": 512,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "torch_dtype": "auto",
        "gradient_checkpointing": True,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "torchtune": {
        "output_dir": "out/run",
        "tokenizer": {"_component_": "t", "max_seq_len": 64},
        "seed": 1,
        "shuffle": True,
        "checkpointer": {"_component_": "c", "checkpoint_dir": "a/b", "output_dir": "${output_dir}"},
        "model": {"_component_": "m.lora_llama3", "lora_attn_modules": ["q_proj"], "lora_rank": 4, "lora_alpha": 8},
        "dataset": [{"_component_": "instruct_dataset", "source": "c/d", "column_map": {"input": "q", "output": "a"}}],
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.95]},
        "batch_size": 2,
        "epochs": 1,
        "lr_scheduler": {"_component_": "get_cosine_schedule_with_warmup", "num_warmup_steps": 3},
        "loss": {"_component_": "CrossEntropyLoss"},
        "metric_logger": {"_component_": "WandBLogger", "project": "p"},
    },
    "openai": {
        "model": "a/b",
        "training_file": "x.jsonl",
        "validation_file": "y.jsonl",
        "suffix": "s",
        "seed": 1,
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1, "batch_size": 4}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
        "hyperparameters": {"n_epochs": 1},
    },
}
PAIRS = {"pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}}


def places(value: Any, location: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*location, step)
        yield from places(inner, (*location, step))


def changed(content: dict[str, Any], location: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    inner: Any = content
    for step in location[:-1]:
        inner = inner[step]
    inner[location[-1]] = value
    return content


@pytest.mark.parametrize("tool", FILES)
def test_odd_values_are_told_or_imported(tool: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(PAIRS))
    options: dict[str, Any] = {"task": "dpo"} if tool == "trl" else {}
    name = "job.json" if tool == "openai" else "config.yaml"
    write = json.dumps if tool == "openai" else yaml.safe_dump
    assert loaded(made(tmp_path, write(FILES[tool]), name=name, tool=tool, **options))
    told = imported = 0
    for index, location in enumerate(places(FILES[tool])):
        for value in ODD[index % 3 :: 3]:  # a third of them at each place, in turns
            try:
                made(tmp_path, write(changed(FILES[tool], location, value)), name=name, tool=tool, **options)
                imported += 1
            except RecipeError:
                told += 1
    assert min(told, imported) > 10
