"""LLaMA-Factory's files, in the forms that its examples have, and dataset_info.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from import_kit import keys, loaded, made, values, without

from distft.core.errors import RecipeError
from distft.importers import IMPORTERS

INFO = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "glaive": {
        "file_name": "glaive.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "orca_pairs": {
        "hf_hub_url": "Intel/orca_dpo_pairs",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
    },
    "ultrachat_200k": {
        "hf_hub_url": "HuggingFaceH4/ultrachat_200k",
        "ms_hub_url": "AI-ModelScope/ultrachat_200k",
        "split": "train_sft",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "openorca": {
        "hf_hub_url": "Open-Orca/OpenOrca",
        "columns": {"prompt": "question", "response": "response", "system": "system_prompt"},
    },
    "adgen_eval": {
        "hf_hub_url": "HasturOfficial/adgen",
        "split": "validation",
        "columns": {"prompt": "content", "response": "summary"},
    },
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
    "refinedweb": {"hf_hub_url": "tiiuae/falcon-refinedweb", "columns": {"prompt": "content"}, "num_samples": 500},
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "mllm_demo": {
        "file_name": "mllm_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
    },
    "judged": {
        "hf_hub_url": "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
        "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    },
    "scripted": {"script_url": "belle.py"},
    "odd": {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "said"}},
    "odd_user": {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"user_tag": "customer"}},
    "newer": {"file_name": "odd.json", "some_setting": 1},
    "oai": {"file_name": "oai.jsonl", "formatting": "openai"},
}

BASE = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""


def changed(text: str, **lines: str | None) -> str:
    """The text with other values: a key that is not there is added, None takes one out."""
    rows = [line for line in text.strip().splitlines() if line.partition(":")[0] not in lines]
    rows += [f"{key}: {value}" for key, value in lines.items() if value is not None]
    return "\n".join(rows) + "\n"


CONFIGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "lora-sft": (
        BASE,
        {
            "name": "sft",
            "output_dir": "saves/llama3-8b/lora",
            "method.name": "lora",
            "method.r": 8,
            "method.alpha": 16.0,
            "method.dropout": 0.0,
            "method.target_modules": "all-linear",
            "data.chat_template": "llama3",
            "data.max_length": 2048,
            "data.long_rows": "truncate",
            "data.packing": False,
            "data.loss_on": "assistant",
            "data.train.0.format": "alpaca",
            "data.train.0.max_rows": 1000,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 1,
            "train.epochs": 3.0,
            "schedule.name": "cosine",
            "schedule.warmup_ratio": 0.1,
            "checkpoint.every_steps": 500,
            "log.every_steps": 10,
            "model.dtype": "bfloat16",
            "train.activation_checkpointing": "full",
        },
        {"overwrite_cache", "preprocessing_num_workers", "plot_loss", "ddp_timeout"},
    ),
    "lora-pretrain": (
        changed(BASE, stage="pt", dataset="c4_demo, refinedweb", template=None),
        {
            "data.train.0.format": "text",
            "data.train.1.columns": {"content": "text"},
            "data.train.1.max_rows": 500,
            "data.packing": True,
            "data.loss_on": "all",
            "objective.name": "sft",
        },
        set(),
    ),
    "lora-dpo": (
        changed(
            BASE,
            stage="dpo",
            dataset="dpo_en_demo,orca_pairs",
            pref_beta="0.1",
            pref_loss="sigmoid",
            pref_ftx="0.2",
            learning_rate="5.0e-6",
            dpo_label_smoothing="0.1",
            ld_alpha="0.5",
        ),
        {
            "objective.name": "dpo",
            "objective.loss": "sigmoid",
            "objective.beta": 0.1,
            "objective.sft_weight": 0.2,
            "objective.label_smoothing": 0.1,
            "objective.ld_alpha": 0.5,
            "data.max_length": 4096,
            "data.train.0.format": "preference",
            "data.train.0.columns": None,
            "data.train.1.columns": {"question": "instruction"},
            "data.long_rows": "drop",
        },
        set(),
    ),
    "lora-orpo": (
        changed(BASE, stage="dpo", dataset="dpo_en_demo", pref_loss="orpo", pref_beta="0.2"),
        {"objective.name": "orpo", "objective.beta": 0.2},
        set(),
    ),
    "lora-simpo": (
        changed(BASE, stage="dpo", dataset="dpo_en_demo", pref_loss="simpo", pref_beta="2.0", simpo_gamma="1.4"),
        {"objective.name": "simpo", "objective.beta": 2.0, "objective.gamma": 1.4, "objective.sft_weight": 0.0},
        set(),
    ),
    "lora-reward": (
        changed(BASE, stage="rm", dataset="dpo_en_demo"),
        {"objective.name": "reward", "data.packing": False},
        set(),
    ),
    "full-ds3": (
        changed(
            BASE,
            finetuning_type="full",
            lora_target=None,
            deepspeed="examples/deepspeed/ds_z3_offload_config.json",
            learning_rate="1.0e-5",
            dataset="ultrachat_200k",
            report_to="none",
            save_only_model="false",
        ),
        {
            "method.name": "full",
            "engine.name": "zero3",
            "engine.offload": "optimizer",
            "data.train.0.format": "messages",
            "data.train.0.split": "train_sft",
            "data.train.0.path": "HuggingFaceH4/ultrachat_200k",
            "data.train.0.columns": None,
        },
        set(),
    ),
    "qlora-otfq": (
        changed(
            BASE,
            quantization_bit="4",
            quantization_method="bnb",
            quantization_type="fp4",
            double_quantization="false",
            trust_remote_code="true",
        ),
        {"method.name": "qlora", "method.quant.type": "fp4", "method.quant.double": False},
        {"trust_remote_code"},
    ),
    "eight-bits": (
        changed(BASE, quantization_bit="8"),
        {"method.name": "lora"},
        {"quantization_bit"},
    ),
    "packed-history": (
        changed(
            BASE,
            dataset="glaive",
            neat_packing="true",
            mask_history="true",
            lora_rank="64",
            lora_alpha="32",
            lora_target="q_proj,v_proj",
            additional_target="embed_tokens,lm_head",
            use_rslora="true",
            template="qwen3",
        ),
        {
            "data.packing": True,
            "data.long_rows": "drop",
            "data.loss_on": "last_turn",
            "method.r": 64,
            "method.target_modules": ["q_proj", "v_proj"],
            "method.modules_to_save": ["embed_tokens", "lm_head"],
            "method.rslora": True,
            "data.train.0.format": "sharegpt",
            "data.chat_template": "auto",
        },
        set(),
    ),
    "evaluated": (
        changed(
            BASE,
            dataset="openorca",
            eval_dataset="adgen_eval",
            eval_strategy="steps",
            eval_steps="50",
            load_best_model_at_end="true",
            early_stopping_steps="5",
            per_device_eval_batch_size="1",
            train_on_prompt="true",
            optim="paged_adamw_8bit",
            save_total_limit="5",
            seed="7",
        ),
        {
            "data.train.0.columns": {"question": "instruction", "response": "output", "system_prompt": "system"},
            "data.eval.0.split": "validation",
            "eval.every_steps": 50,
            "eval.early_stop": 5,
            "train.load_best": True,
            "checkpoint.best": True,
            "data.loss_on": "all",
            "optim.name": "paged_adamw_8bit",
            "checkpoint.keep": 5,
            "seed": 7,
        },
        {"per_device_eval_batch_size"},
    ),
    "fsdp": (
        changed(
            BASE,
            finetuning_type="full",
            lora_target=None,
            fsdp="full_shard auto_wrap offload",
            fsdp_config="{fsdp_version: 2, reshard_after_forward: true, state_dict_type: FULL_STATE_DICT}",
            flash_attn="fa2",
            enable_liger_kernel="true",
            pure_bf16="true",
            bf16=None,
            dataset="oai",
            disable_shuffling="true",
            disable_gradient_checkpointing="true",
            max_steps="100",
        ),
        {
            "engine.name": "fsdp2",
            "engine.offload": "all",
            "model.dtype": "bfloat16",
            "data.train.0.format": "messages",
            "data.shuffle": False,
            "train.activation_checkpointing": "off",
            "train.max_steps": 100,
        },
        {"flash_attn", "enable_liger_kernel", "num_train_epochs"},
    ),
    "freeze": (
        changed(BASE, finetuning_type="freeze", lora_target=None, freeze_trainable_layers="3"),
        {"method.name": "freeze", "method.last_blocks": 3},
        set(),
    ),
    "oft": (
        changed(
            BASE, finetuning_type="oft", lora_target=None, oft_target="all", oft_block_size="16", quantization_bit="4"
        ),
        {"method.name": "oft", "method.oft_block_size": 16, "method.target_modules": "all-linear"},
        set(),
    ),
    "galore": (
        changed(BASE, finetuning_type="full", lora_target=None, use_galore="true", galore_rank="128", pure_bf16="true"),
        {"optim.name": "galore", "optim.rank": 128, "optim.update_gap": 200, "optim.scale": 2.0, "method.name": "full"},
        set(),
    ),
    "apollo": (
        changed(BASE, finetuning_type="full", lora_target=None, use_apollo="true", apollo_scale_type="tensor"),
        {"optim.name": "apollo", "optim.rank": 16, "optim.scale": 32.0, "optim.scale_by": "tensor"},
        set(),
    ),
    "lora-in-full": (
        changed(
            BASE,
            loraplus_lr_ratio="16.0",
            pissa_init="true",
            pissa_convert="true",
            add_tokens="<a>,<b>",
            add_special_tokens="<c>",
            resize_vocab="true",
        ),
        {
            "method.lora_plus_ratio": 16.0,
            "method.init": "pissa",
            "model.add_tokens": ["<a>", "<b>"],
            "model.add_special_tokens": ["<c>"],
        },
        {"pissa_convert"},
    ),
    "continued": (changed(BASE, adapter_name_or_path="saves/old"), {"method.start": "saves/old"}, set()),
    "defaults": (
        "model_name_or_path: Qwen/Qwen3-0.6B\nstage: sft\ndataset: identity\ntemplate: qwen3\n",
        {
            "optim.learning_rate": 5e-5,
            "train.epochs": 3.0,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 8,
            "schedule.name": "linear",
            "data.max_length": 2048,
            "model.dtype": "float32",
            "name": "config",
        },
        set(),
    ),
}


@pytest.fixture(autouse=True)
def _info(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    text, expected, left = CONFIGS[name]
    imported = made(tmp_path, text)
    assert imported.tool == "llama_factory"
    assert values(loaded(imported), expected) == expected
    assert left <= keys(imported.left)
    assert not imported.unknown


def test_files_of_dataset_info_are_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    text = changed(BASE, dataset="rows", dataset_dir=str(folder))
    assert loaded(made(tmp_path, text)).data.train[0].path == str(folder / "rows.json")


REFUSED = {
    "ppo": (changed(BASE, stage="ppo"), 'stage = "ppo"  is not trained here'),
    "method": (changed(BASE, finetuning_type="prefix"), "is not a method here  known: lora, full, freeze, oft"),
    "first blocks": (
        changed(BASE, finetuning_type="freeze", lora_target=None, freeze_trainable_layers="-2"),
        "trains blocks at the beginning",
    ),
    "some modules": (
        changed(BASE, finetuning_type="freeze", lora_target=None, freeze_trainable_modules="mlp"),
        "trains some modules of the last blocks",
    ),
    "badam": (changed(BASE, finetuning_type="full", lora_target=None, use_badam="true"), "one block after another"),
    "layerwise": (
        changed(BASE, finetuning_type="full", lora_target=None, use_galore="true", galore_layerwise="true"),
        "updates in the backward pass by this optimizer are not here",
    ),
    "number of blocks": (
        changed(BASE, finetuning_type="oft", lora_target=None, oft_rank="8"),
        "is the number of blocks; here their size is set",
    ),
    "shape": (changed(BASE, resize_vocab="true"), "changes the model's shape without a token"),
    "loss": (
        changed(BASE, stage="dpo", dataset="dpo_en_demo", pref_loss="kto_pair"),
        "loss kto_pair is not trained here",
    ),
    "pairs": (changed(BASE, dataset="dpo_en_demo"), "holds pairs (ranking: true); stage sft trains on single answers"),
    "single": (changed(BASE, stage="dpo"), "holds single answers; stage dpo trains on pairs"),
    "missing": (changed(BASE, dataset="identitty"), "identitty is not in"),
    "images": (changed(BASE, dataset="mllm_demo"), "has images, which are not trained on here"),
    "script": (changed(BASE, dataset="scripted"), "loading scripts are never run"),
    "turns": (changed(BASE, dataset="odd"), "turns have who and said"),
    "user": (changed(BASE, dataset="odd_user"), "user_tag customer is not known"),
    "newer": (changed(BASE, dataset="newer"), "newer has some_setting, which is not known to this importer"),
    "bits": (changed(BASE, quantization_bit="2"), "bases are in 4 bits or in 16 here"),
    "hqq": (changed(BASE, quantization_bit="4", quantization_method="hqq"), "4-bit bases are bitsandbytes' here"),
    "mix": (changed(BASE, mix_strategy="interleave_under", interleave_probs="0.5,0.5"), "draws sources by chance"),
    "adapter": (
        changed(BASE, adapter_name_or_path="saves/old", create_new_adapter="true"),
        "is merged into the base before a new adapter begins",
    ),
    "predict": (changed(BASE, do_train="false"), "a file of another command"),
    "adafactor": (changed(BASE, optim="adafactor"), "scales it by the size of each weight"),
    "orpo with likelihood": (
        changed(BASE, stage="dpo", dataset="dpo_en_demo", pref_loss="orpo", pref_ftx="0.5"),
        "orpo has no such term here",
    ),
    "targets": (changed(BASE, lora_target="all,lm_head"), "names modules beside all"),
    "dft": (changed(BASE, use_dft_loss="true"), "DFT weighs tokens by their probability"),
    "qlora+full": (changed(BASE, finetuning_type="full", lora_target=None, quantization_bit="4"), "needs a base in 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_another_model_is_refused_at_its_line(name: str, tmp_path: Path) -> None:
    text, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)
    assert all(problem.line for problem in caught.value.problems), str(caught.value)


def test_a_data_set_without_dataset_info_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(RecipeError, match="neither in data nor beside the file") as caught:
        made(tmp_path, BASE)
    assert "set dataset_dir to its folder" in str(caught.value)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(RecipeError, match="not valid JSON"):
        made(tmp_path, BASE)


def test_kto_asks_the_registry(tmp_path: Path) -> None:
    text = changed(BASE, stage="kto", dataset="kto_en_demo,judged", pref_beta="0.3", kto_chosen_weight="1.5")
    expected = {
        "objective.name": "kto",
        "objective.beta": 0.3,
        "objective.desirable_weight": 1.5,
        "data.train.0.format": "unpaired",
        "data.train.0.columns": None,
        "data.train.1.columns": {"prompt": "instruction", "completion": "output"},
    }
    assert values(loaded(made(tmp_path, text)), expected) == expected
    with pytest.raises(RecipeError, match="KTO is not trained here"):
        made(tmp_path, text, registries=without("objective", "kto"))


@pytest.mark.parametrize("tool", ["llama_factory", "trl"])
def test_every_training_argument_of_transformers_is_known(tool: str) -> None:
    from transformers import TrainingArguments

    known = IMPORTERS[tool].keys[""]
    assert [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in known] == []
