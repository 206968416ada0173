"""torchtune's files, in the forms that its recipes' configs have: what they become."""

from pathlib import Path
from typing import Any

import pytest
from import_kit import keys, loaded, made, values

from distft.core.errors import RecipeError

HEAD = """
output_dir: /runs/torchtune/{name}
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/Llama/original/tokenizer.model
  max_seq_len: {length}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/Llama
  checkpoint_files: [model-00001-of-00002.safetensors, model-00002-of-00002.safetensors]
  recipe_checkpoint: null
  output_dir: ${{output_dir}}
  model_type: LLAMA3
resume_from_checkpoint: False
seed: null
shuffle: True
device: cuda
dtype: bf16
log_every_n_steps: 1
log_peak_memory_stats: True
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${{output_dir}}/logs
enable_activation_checkpointing: True
enable_activation_offloading: False
compile: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
"""
FULL = """
model:
  _component_: torchtune.models.llama3_1.llama3_1_8b
"""
LORA = """
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
"""
ADAMW = """
optimizer:
  _component_: torch.optim.AdamW
  lr: 2e-5
  fused: True
"""
COSINE = """
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
"""
CE = """
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
"""
LENGTH = """
batch_size: 2
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
"""
ALPACA = """
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  packed: False
"""


def config(*parts: str, name: str = "run", length: str = "null") -> str:
    return HEAD.format(name=name, length=length) + "".join(parts)


def dataset(component: str, *lines: str) -> str:
    return "\n".join(
        ["", "dataset:", f"  _component_: torchtune.datasets.{component}", *(f"  {line}" for line in lines), ""]
    )


DPO = "\nloss:\n  _component_: torchtune.rlhf.loss.DPOLoss\n  beta: 0.1\n  label_smoothing: 0\n"
STACK = dataset("stack_exchange_paired_dataset")
CONFIGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "8B_full": (
        config(FULL, ALPACA, ADAMW, CE, LENGTH, name="llama3_1_8B/full"),
        {
            "name": "full",
            "output_dir": "/runs/torchtune/llama3_1_8B",
            "model.path": "/models/Llama",
            "method.name": "full",
            "data.train.0.path": "tatsu-lab/alpaca",
            "data.train.0.format": "alpaca",
            "data.loss_on": "all",
            "data.max_length": 2048,
            "data.long_rows": "error",
            "data.packing": False,
            "optim.name": "adamw",
            "optim.learning_rate": 2e-5,
            "optim.weight_decay": 0.01,
            "schedule.name": "constant",
            "train.global_batch_size": 16,
            "train.micro_batch_size": 2,
            "train.max_grad_norm": "off",
            "train.activation_checkpointing": "full",
            "seed": 42,
            "model.dtype": "bfloat16",
        },
        {"tokenizer.path", "checkpointer.checkpoint_files", "metric_logger.log_dir"},
    ),
    "8B_lora": (
        config(
            LORA,
            dataset("alpaca_cleaned_dataset", "packed: True"),
            ADAMW + "  weight_decay: 0.05\n",
            COSINE,
            CE,
            LENGTH,
            length="4096",
        ),
        {
            "method.name": "lora",
            "method.r": 8,
            "method.alpha": 16.0,
            "data.packing": True,
            "data.max_length": 4096,
            "method.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "data.long_rows": "truncate",
            "optim.weight_decay": 0.05,
            "schedule.name": "cosine",
            "schedule.warmup_steps": 100,
            "data.train.0.path": "yahma/alpaca-cleaned",
        },
        set(),
    ),
    "8B_qlora": (
        config(LORA.replace("lora_llama3", "qlora_llama3"), ALPACA, ADAMW, COSINE, CE, LENGTH, "\nlow_cpu_ram: True\n"),
        {"method.name": "qlora", "method.quant.type": "nf4", "method.quant.double": True},
        set(),
    ),
    "70B_full_offload": (
        config(
            FULL,
            ALPACA,
            ADAMW.replace("torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW8bit"),
            CE,
            LENGTH,
            "\nfsdp_cpu_offload: True\ncustom_sharded_layers: [tok_embeddings, output]\noptimizer_in_bwd: True\n",
        ),
        {"engine.name": "fsdp2", "engine.offload": "all", "optim.name": "paged_adamw_8bit"},
        {"custom_sharded_layers", "optimizer_in_bwd"},
    ),
    "lora_dpo": (
        config(
            LORA,
            STACK,
            ADAMW.replace("2e-5", "5e-4"),
            COSINE,
            DPO,
            LENGTH.replace("epoch: null", "epoch: 1000"),
            length="1024",
        ),
        {
            "objective.name": "dpo",
            "objective.beta": 0.1,
            "data.max_length": 2048,
            "train.max_steps": 1000,
            "data.train.0.path": "lvwerra/stack-exchange-paired",
            "data.long_rows": "drop",
            "data.train.0.columns": {"question": "instruction", "response_j": "chosen", "response_k": "rejected"},
        },
        set(),
    ),
    "full_dpo_rso": (
        config(
            FULL,
            STACK,
            ADAMW,
            DPO.replace("DPOLoss", "RSOLoss").replace("beta", "gamma").replace("  label_smoothing: 0\n", ""),
            LENGTH,
        ),
        {"objective.loss": "hinge", "objective.beta": 0.1},
        set(),
    ),
    "simpo": (
        config(
            FULL,
            STACK,
            ADAMW,
            "\nloss:\n  _component_: torchtune.rlhf.loss.SimPOLoss\n  beta: 2.0\n  gamma: 0.5\n",
            LENGTH,
        ),
        {"objective.name": "simpo", "objective.beta": 2.0, "objective.gamma": 0.5},
        set(),
    ),
    "chat": (
        config(
            LORA,
            dataset(
                "chat_dataset",
                "source: json",
                "data_files: [a.jsonl, b.jsonl]",
                "conversation_column: turns",
                "conversation_style: openai",
                "split: train",
            ),
            ADAMW,
            CE,
            LENGTH,
        ),
        {
            "data.train.0.path": "a.jsonl",
            "data.train.1.path": "b.jsonl",
            "data.train.0.format": "messages",
            "data.train.0.columns": {"turns": "messages"},
            "data.loss_on": "assistant",
            "data.train.0.split": None,
        },
        set(),
    ),
    "slimorca": (
        config(LORA, dataset("slimorca_dataset"), ADAMW, CE, LENGTH, "\nsave_every_n_steps: 50\n"),
        {"data.train.0.format": "sharegpt", "checkpoint.every_steps": 50, "data.loss_on": "assistant"},
        set(),
    ),
    "text": (
        config(
            FULL,
            dataset(
                "text_completion_dataset",
                "source: allenai/c4",
                "name: en",
                "column: body",
                "packed: True",
                "split_across_pack: True",
                "split: train[:100]",
            ),
            ADAMW,
            CE,
            LENGTH,
            length="8192",
        ),
        {
            "data.train.0.format": "text",
            "data.train.0.columns": {"body": "text"},
            "data.loss_on": "all",
            "data.train.0.subset": "en",
            "data.train.0.max_rows": 100,
            "data.packing": True,
        },
        {"dataset.split_across_pack"},
    ),
    "instruct_with_validation": (
        config(
            LORA,
            dataset(
                "instruct_dataset", "source: acme/qa", "column_map: {input: q, output: a}", "train_on_input: False"
            ),
            "\ndataset_val:\n  _component_: torchtune.datasets.instruct_dataset\n  source: acme/qa\n  split: test\n"
            "  column_map: {input: q, output: a}\nrun_val_every_n_steps: 25\nbatch_size_val: 4\n",
            ADAMW,
            CE,
            LENGTH.replace("clip_grad_norm: null", "clip_grad_norm: 1.0").replace("epochs: 1", "epochs: 3"),
        ),
        {
            "data.train.0.columns": {"q": "instruction", "a": "output"},
            "data.eval.0.split": "test",
            "eval.every_steps": 25,
            "train.max_grad_norm": 1.0,
            "train.epochs": 3.0,
            "data.loss_on": "assistant",
        },
        {"batch_size_val"},
    ),
    "two_datasets_wandb": (
        config(
            LORA + "  use_dora: True\n",
            "\ndataset:\n"
            "  - _component_: torchtune.datasets.instruct_dataset\n    source: acme/qa\n"
            "  - _component_: torchtune.datasets.chat_dataset\n    source: acme/chats\n    "
            "conversation_style: sharegpt\n",
            ADAMW.replace("torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit") + "  betas: [0.9, 0.95]\n  eps: 1e-6\n",
            CE,
            LENGTH,
        )
        .replace(
            "torchtune.training.metric_logging.DiskLogger\n  log_dir: ${output_dir}/logs",
            "torchtune.training.metric_logging.WandBLogger\n  project: tune",
        )
        .replace("seed: null", "seed: 1234")
        .replace("compile: False", "compile: True"),
        {
            "method.dora": True,
            "data.train.1.format": "sharegpt",
            "optim.name": "adamw_8bit",
            "optim.betas": [0.9, 0.95],
            "optim.eps": 1e-6,
            "log.wandb": "tune",
            "seed": 1234,
            "train.compile": True,
        },
        set(),
    ),
    "preference_full": (
        config(
            FULL,
            dataset("preference_dataset", "source: acme/pairs", "column_map: {chosen: good, rejected: bad}"),
            ADAMW,
            DPO,
            LENGTH,
            "\nfsdp_reshard_after_forward: False\n",
        ).replace("dtype: bf16", "dtype: fp32"),
        {
            "data.train.0.columns": {"good": "chosen", "bad": "rejected"},
            "engine.gather": "once_a_step",
            "model.dtype": "float32",
        },
        set(),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    text, expected, left = CONFIGS[name]
    imported = made(tmp_path, text)
    assert imported.tool == "torchtune"
    assert values(loaded(imported), expected) == expected
    assert left <= keys(imported.left)
    assert not imported.unknown


REFUSED = {
    "sgd": (config(FULL, ALPACA, ADAMW.replace("AdamW", "SGD"), CE, LENGTH), "is not an optimizer here"),
    "rex": (
        config(FULL, ALPACA, ADAMW, COSINE.replace("get_cosine_schedule_with_warmup", "get_rex_scheduler"), CE, LENGTH),
        "is a schedule that is not here",
    ),
    "ipo": (
        config(FULL, STACK, ADAMW, DPO.replace("DPOLoss", "IPOLoss"), LENGTH),
        "takes the sum of an answer's tokens",
    ),
    "kd": (
        config(LORA, ALPACA, ADAMW, CE, LENGTH, "\nkd_loss:\n  _component_: torchtune.modules.loss.ForwardKLLoss\n"),
        "[objective] distill does so on the student's own answers",
    ),
    "qat": (
        config(FULL, ALPACA, ADAMW, CE, LENGTH, "\nquantizer:\n  _component_: torchtune.training.quantization.Q\n"),
        "take a lora_ builder, and [method] deploy",
    ),
    "grpo": (
        config(FULL, ALPACA, ADAMW, CE.replace("CEWithChunkedOutputLoss", "GRPOLoss"), LENGTH),
        "is a loss that is not here",
    ),
    "vision": (
        config(FULL.replace("llama3_1.llama3_1_8b", "llama3_2_vision.llama3_2_vision_11b"), ALPACA, ADAMW, CE, LENGTH),
        "is no text model that is trained here",
    ),
    "dataset": (
        config(FULL, dataset("multimodal.the_cauldron_dataset"), ADAMW, CE, LENGTH),
        "builds rows in a way that is not known",
    ),
    "pairs": (config(FULL, STACK, ADAMW, CE, LENGTH), "does not fit the loss, which trains on single answers"),
    "system": (
        config(FULL, dataset("instruct_dataset", "source: a/b", "new_system_prompt: Hi"), ADAMW, CE, LENGTH),
        "writes a system message into every row",
    ),
    "module": (config(LORA.replace("'v_proj'", "'w_proj'"), ALPACA, ADAMW, CE, LENGTH), "w_proj is not known"),
    "reference": (
        config(FULL, ALPACA, ADAMW, CE, LENGTH).replace("${output_dir}/logs", "${outptu_dir}/logs"),
        "${outptu_dir} names no value of the file",
    ),
    "source": (config(FULL, dataset("instruct_dataset"), ADAMW, CE, LENGTH), "a dataset without a source"),
    "masks": (
        config(
            LORA,
            "\ndataset:\n  - {_component_: torchtune.datasets.alpaca_dataset}\n"
            "  - {_component_: torchtune.datasets.chat_dataset, source: a/b}\n",
            ADAMW,
            CE,
            LENGTH,
        ),
        "data sets differ in train_on_input",
    ),
    "betas": (config(FULL, ALPACA, ADAMW + "  betas: 0.9\n", CE, LENGTH), "must be two numbers below 1"),
    "dtype": (config(FULL, ALPACA, ADAMW, CE, LENGTH).replace("dtype: bf16", "dtype: fp16"), "is not trained in here"),
    "lr": (config(FULL, ALPACA, ADAMW.replace("  lr: 2e-5\n", ""), CE, LENGTH), "optimizer.lr is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_another_model_is_refused_at_its_line(name: str, tmp_path: Path) -> None:
    text, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)
    assert all(problem.line for problem in caught.value.problems), str(caught.value)


def test_a_reference_in_a_circle_is_refused(tmp_path: Path) -> None:
    text = config(FULL, ALPACA, ADAMW, CE, LENGTH, "\na: ${b}\nb: ${a}\n")
    with pytest.raises(RecipeError, match="names no value of the file"):
        made(tmp_path, text)


def test_unknown_keys_of_every_section_are_listed(tmp_path: Path) -> None:
    text = config(
        LORA + "  lora_fancy: 1\n", ALPACA + "  wild: 2\n", ADAMW + "  ams: true\n", CE, LENGTH, "\nnew_key: 3\n"
    )
    unknown = keys(made(tmp_path, text).unknown)
    assert unknown == {"model.lora_fancy", "dataset.wild", "optimizer.ams", "new_key"}
