"""Axolotl's files, in the forms that its examples have: what they become."""

from pathlib import Path
from typing import Any

import pytest
from import_kit import keys, loaded, made, values, without

from distft.core.errors import RecipeError

BASE = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
output_dir: ./outputs/run
sequence_len: 2048
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
"""
LORA = """
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
"""

CONFIGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "lora-8bit-packed": (
        """
        base_model: NousResearch/Meta-Llama-3-8B
        model_type: LlamaForCausalLM
        tokenizer_type: AutoTokenizer
        load_in_8bit: true
        load_in_4bit: false
        strict: false
        datasets:
          - path: mhenrichsen/alpaca_2k_test
            type: alpaca
        dataset_prepared_path: last_run_prepared
        val_set_size: 0.05
        output_dir: ./outputs/lora-out
        sequence_len: 4096
        sample_packing: true
        eval_sample_packing: false
        pad_to_sequence_len: true
        adapter: lora
        lora_model_dir:
        lora_r: 32
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        lora_modules_to_save: [embed_tokens, lm_head]
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: auto
        tf32: false
        gradient_checkpointing: true
        logging_steps: 1
        flash_attention: true
        warmup_steps: 10
        evals_per_epoch: 4
        saves_per_epoch: 1
        weight_decay: 0.0
        special_tokens:
          pad_token: <|end_of_text|>
        """,
        {
            "name": "lora-out",
            "output_dir": "outputs",
            "model.path": "NousResearch/Meta-Llama-3-8B",
            "method.name": "lora",
            "method.r": 32,
            "method.alpha": 16.0,
            "method.target_modules": "all-linear",
            "method.modules_to_save": ["embed_tokens", "lm_head"],
            "data.packing": True,
            "data.max_length": 4096,
            "data.long_rows": "drop",
            "data.loss_on": "assistant",
            "optim.name": "adamw_8bit",
            "optim.learning_rate": 2e-4,
            "schedule.warmup_steps": 10,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 2,
            "train.epochs": 4.0,
            "train.activation_checkpointing": "full",
        },
        {
            "load_in_8bit",
            "val_set_size",
            "flash_attention",
            "evals_per_epoch",
            "saves_per_epoch",
            "special_tokens",
            "model_type",
            "tokenizer_type",
            "dataset_prepared_path",
            "pad_to_sequence_len",
        },
    ),
    "qlora-fsdp-70b": (
        """
        base_model: casperhansen/llama-3-70b-fp16
        load_in_4bit: true
        datasets:
          - path: tatsu-lab/alpaca
            type: alpaca
        adapter: qlora
        sequence_len: 512
        sample_packing: false
        lora_r: 8
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_modules:
        lora_target_linear: true
        lora_fan_in_fan_out:
        gradient_accumulation_steps: 4
        micro_batch_size: 1
        num_epochs: 4
        optimizer: adamw_torch
        lr_scheduler: cosine
        learning_rate: 0.00001
        train_on_inputs: false
        bf16: auto
        fp16:
        gradient_checkpointing: true
        gradient_checkpointing_kwargs:
          use_reentrant: true
        fsdp:
          - full_shard
          - auto_wrap
        fsdp_config:
          fsdp_limit_all_gathers: true
          fsdp_sync_module_states: true
          fsdp_offload_params: true
          fsdp_use_orig_params: false
          fsdp_cpu_ram_efficient_loading: true
          fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
          fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
          fsdp_state_dict_type: FULL_STATE_DICT
          fsdp_sharding_strategy: FULL_SHARD
        output_dir: ./outputs/out/qlora-llama3-70b
        """,
        {
            "name": "qlora-llama3-70b",
            "output_dir": "outputs/out",
            "method.name": "qlora",
            "method.quant.type": "nf4",
            "method.quant.double": True,
            "engine.name": "fsdp2",
            "engine.offload": "all",
            "data.packing": False,
            "data.max_length": 512,
            "schedule.warmup_ratio": 0.03,
            "train.global_batch_size": 4,
        },
        {"gradient_checkpointing_kwargs"},
    ),
    "full-fsdp2-liger": (
        """
        base_model: NousResearch/Meta-Llama-3.1-8B
        plugins:
          - axolotl.integrations.liger.LigerPlugin
        liger_rope: true
        liger_fused_linear_cross_entropy: true
        chat_template: llama3
        datasets:
          - path: mlabonne/FineTome-100k
            type: chat_template
            split: train[:20%]
            field_messages: conversations
            message_property_mappings:
              role: from
              content: value
        sequence_len: 4096
        sample_packing: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_torch_fused
        lr_scheduler: cosine
        learning_rate: 2e-5
        fsdp_version: 2
        fsdp_config:
          offload_params: false
          auto_wrap_policy: TRANSFORMER_BASED_WRAP
          transformer_layer_cls_to_wrap: LlamaDecoderLayer
          state_dict_type: FULL_STATE_DICT
          reshard_after_forward: false
          activation_checkpointing: true
        """.replace("train[:20%]", "train[:20000]"),
        {
            "method.name": "full",
            "engine.name": "fsdp2",
            "engine.gather": "once_a_step",
            "data.chat_template": "llama3",
            "data.train.0.format": "sharegpt",
            "data.train.0.max_rows": 20000,
            "data.train.0.split": None,
            "data.train.0.columns": None,
            "train.activation_checkpointing": "full",
            "model.dtype": "bfloat16",
            "name": "model-out",
        },
        {"plugins", "liger_rope", "liger_fused_linear_cross_entropy"},
    ),
    "dpo-chat-template": (
        """
        base_model: meta-llama/Meta-Llama-3-8B-Instruct
        chat_template: llama3
        rl: dpo
        rl_beta: 0.2
        datasets:
          - path: fozziethebeat/alpaca_messages_2k_dpo_test
            type: chat_template.default
            field_messages: conversation
            field_chosen: chosen
            field_rejected: rejected
            message_property_mappings:
              role: role
              content: content
            roles:
              system: [system]
              user: [user]
              assistant: [assistant]
        sequence_len: 4096
        sample_packing: false
        adapter: lora
        lora_r: 32
        lora_alpha: 16
        lora_target_linear: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        output_dir: ./outputs/dpo
        """,
        {
            "objective.name": "dpo",
            "objective.beta": 0.2,
            "objective.loss": "sigmoid",
            "data.max_length": 8192,
            "data.train.0.format": "preference",
            "data.train.0.columns": {"conversation": "prompt"},
            "data.packing": False,
            "train.global_batch_size": 8,
            "method.dropout": 0.0,
        },
        {"datasets[0].roles"},
    ),
    "dpo-intel-chatml": (
        BASE.replace("type: alpaca", "type: chatml.intel").replace("teknium/GPT4-LLM-Cleaned", "Intel/orca_dpo_pairs")
        + "rl: ipo\nmax_grad_norm: 0.5\nwarmup_ratio: 0.1\nadam_beta2: 0.95\n"
        + LORA,
        {
            "objective.name": "dpo",
            "objective.loss": "ipo",
            "data.chat_template": "chatml",
            "data.train.0.columns": {"question": "instruction"},
            "optim.betas": [0.9, 0.95],
            "train.max_grad_norm": 0.5,
            "schedule.warmup_ratio": 0.1,
        },
        set(),
    ),
    "orpo": (
        BASE.replace("type: alpaca", "type: chat_template.argilla")
        + "rl: orpo\norpo_alpha: 0.1\nchat_template: chatml\n",
        {
            "objective.name": "orpo",
            "objective.beta": 0.1,
            "data.chat_template": "chatml",
            "data.train.0.format": "preference",
        },
        set(),
    ),
    "simpo": (
        BASE.replace("type: alpaca", "type: chatml.ultra")
        + "rl: simpo\nrl_beta: 2.0\nsimpo_gamma: 1.0\ncpo_alpha: 0.5\n",
        {"objective.name": "simpo", "objective.beta": 2.0, "objective.gamma": 1.0, "objective.sft_weight": 0.5},
        set(),
    ),
    "reward-model": (
        """
        base_model: google/gemma-2-2b
        model_type: AutoModelForSequenceClassification
        num_labels: 1
        reward_model: true
        chat_template: gemma
        datasets:
          - path: argilla/distilabel-intel-orca-dpo-pairs
            type: bradley_terry.chat_template
        sequence_len: 2048
        sample_packing: false
        remove_unused_columns: false
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: true
        output_dir: ./outputs/out
        """,
        {"objective.name": "reward", "data.chat_template": "auto", "data.train.0.columns": {"input": "instruction"}},
        {"num_labels", "model_type"},
    ),
    "pretraining": (
        """
        base_model: TinyLlama/TinyLlama-1.1B-Chat-v1.0
        max_steps: 200
        pretraining_dataset:
          - path: allenai/c4
            name: en
            type: pretrain
        sequence_len: 2048
        sample_packing: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_bnb_8bit
        lr_scheduler: linear
        learning_rate: 0.0002
        output_dir: ./outputs/model-out
        """,
        {
            "data.train.0.format": "text",
            "data.train.0.subset": "en",
            "data.loss_on": "all",
            "train.max_steps": 200,
            "train.epochs": None,
            "data.packing": True,
            "schedule.name": "linear",
        },
        {"num_epochs"},
    ),
    "deepspeed-zero1-completion": (
        """
        base_model: mistralai/Mistral-7B-v0.1
        datasets:
          - path: json
            data_files: [rows/a.jsonl, rows/b.jsonl]
            type: completion
            field: body
        test_datasets:
          - path: rows/held.jsonl
            type: completion
            field: body
        eval_steps: 50
        early_stopping_patience: 3
        load_best_model_at_end: true
        save_steps: 100
        save_total_limit: 1
        sequence_len: 8192
        sample_packing: true
        gradient_accumulation_steps: 2
        micro_batch_size: 2
        num_epochs: 3
        optimizer: paged_adamw_32bit
        lr_scheduler: constant_with_warmup
        warmup_steps: 5
        learning_rate: 0.000005
        deepspeed: deepspeed_configs/zero1.json
        wandb_project: mistral
        seed: 17
        output_dir: /data/runs/mistral
        """,
        {
            "data.train.0.path": "rows/a.jsonl",
            "data.train.1.path": "rows/b.jsonl",
            "data.train.0.columns": {"body": "text"},
            "data.eval.0.path": "rows/held.jsonl",
            "eval.every_steps": 50,
            "eval.early_stop": 3,
            "checkpoint.best": True,
            "train.load_best": True,
            "checkpoint.every_steps": 100,
            "checkpoint.keep": 2,
            "optim.name": "paged_adamw_32bit",
            "schedule.name": "constant",
            "schedule.warmup_steps": 5,
            "engine.name": "zero1",
            "log.wandb": "mistral",
            "seed": 17,
            "output_dir": "/data/runs",
            "data.loss_on": "all",
        },
        set(),
    ),
    "chat-messages-inputs": (
        BASE.replace(
            "    type: alpaca", "    type: chat_template\n    roles_to_train: [assistant]\n    train_on_eos: turn"
        )
        + LORA
        + "chat_template: tokenizer_default\ntrain_on_inputs: true\nsample_packing: true\npeft_use_rslora: true\n"
        "bf16: false\nfloat32: true\nlr_scheduler_kwargs: {num_cycles: 0.5}\n",
        {
            "data.train.0.format": "messages",
            "data.loss_on": "all",
            "method.rslora": True,
            "model.dtype": "float32",
            "data.chat_template": "auto",
        },
        set(),
    ),
    "deduplicate-kernels": (
        BASE
        + LORA
        + "dataset_exact_deduplication: true\nlora_mlp_kernel: true\nlora_qkv_kernel: true\nlora_o_kernel: true\n"
        "excess_length_strategy: truncate\ncosine_min_lr_ratio: 0.1\ntorch_compile: true\neager_attention: true\n",
        {
            "schedule.min_ratio": 0.1,
            "train.compile": True,
            "model.attention": "eager",
            "data.long_rows": "truncate",
        },
        {"dataset_exact_deduplication", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"},
    ),
    "lora-in-full": (
        BASE
        + LORA.replace("lora_target_linear: true", "lora_target_modules: [q_proj, v_proj]")
        + "loraplus_lr_ratio: 16\nlora_target_parameters: [experts.down_proj]\npeft_layers_to_transform: [0, 3]\n"
        "peft_init_lora_weights: pissa_niter_16\ntokens: ['<call>', '</call>']\n",
        {
            "method.lora_plus_ratio": 16.0,
            "method.target_parameters": ["experts.down_proj"],
            "method.layers_to_transform": [0, 3],
            "method.init": "pissa",
            "model.add_tokens": ["<call>", "</call>"],
        },
        set(),
    ),
    "experts-of-all-linear": (
        BASE + LORA + "lora_target_parameters: [experts.down_proj]\nlora_model_dir: ./old\n",
        {"method.target_parameters": [], "method.target_modules": "all-linear", "method.start": "./old"},
        {"lora_target_parameters"},
    ),
    "unfrozen": (
        BASE + "unfrozen_parameters:\n  - ^lm_head.weight$\n  - model.layers.2[0-9]+.block\n",
        {"method.name": "freeze", "method.parameters": ["^lm_head.weight$", "(?:model.layers.2[0-9]+.block).*"]},
        set(),
    ),
    "share-of-a-split": (
        BASE.replace("    type: alpaca", "    type: alpaca\n    split: train[:20%]"),
        {"data.train.0.split": "train[:20%]", "data.train.0.max_rows": None},
        set(),
    ),
    "own-type": (
        BASE.replace(
            "    type: alpaca",
            "    type:\n      field_instruction: ask\n      field_output: answer\n      "
            "field_input:\n      format: '[INST] {instruction} [/INST]'",
        )
        + LORA,
        {"data.train.0.format": "alpaca", "data.train.0.columns": {"ask": "instruction", "answer": "output"}},
        set(),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    text, expected, left = CONFIGS[name]
    imported = made(tmp_path, text)
    assert imported.tool == "axolotl"
    assert values(loaded(imported), expected) == expected
    assert left <= keys(imported.left)
    assert not imported.unknown


REFUSED = {
    "neftune": (BASE + LORA + "neftune_noise_alpha: 5\n", "NEFTune adds noise to embeddings"),
    "relora": (BASE + LORA + "relora_steps: 150\n", "restarts of the adapter"),
    "optimizer": (BASE.replace("adamw_torch_fused", "muon") + LORA, "is not an optimizer here"),
    "schedule": (BASE.replace("cosine", "rex") + LORA, "is not a schedule here"),
    "cycles": (
        BASE.replace("cosine", "cosine_with_restarts") + "lr_scheduler_kwargs:\n  num_cycles: 3\n",
        "another curve",
    ),
    "grpo": (BASE + "rl: grpo\n", 'write [objective] name = "grpo" and [rollout] by hand'),
    "unfrozen": (
        BASE + "unfrozen_parameters: ['^model.embed_tokens.weight$[:32000]']\n",
        "trains some rows of a parameter: ^model.embed_tokens.weight$[:32000]",
    ),
    "init": (BASE + LORA + "peft_init_lora_weights: corda\n", "is no start of an adapter here"),
    "images": (BASE + LORA + "processor_type: AutoProcessor\n", "reads images or sound"),
    "adapter": (BASE + "adapter: llama-adapter\n", "is not imported  known: lora, qlora"),
    "bits": (BASE + "load_in_4bit: true\n", "full fine-tuning needs a base in 16 or 32 bits"),
    "type": (BASE.replace("type: alpaca", "type: input_output"), "has no type that is known"),
    "no type": (BASE.replace("    type: alpaca\n", ""), "has no type that is known"),
    "roles": (BASE.replace("    type: alpaca", "    type: chat_template\n    roles_to_train: [user]"), "other turns"),
    "split": (BASE.replace("    type: alpaca", "    type: alpaca\n    split: train[5:9:2]"), "is a part of a split"),
    "shards": (BASE.replace("    type: alpaca", "    type: alpaca\n    shards: 10"), "takes a part of the rows"),
    "targets": (
        BASE + LORA.replace("lora_target_linear: true", ""),
        "neither lora_target_linear nor lora_target_modules",
    ),
    "warm-up": (BASE + "max_steps: 10\nwarmup_steps: 20\n", "warmup_steps = 20  becomes [schedule] warmup_steps"),
    "rate": (BASE.replace("learning_rate: 2e-4\n", ""), "learning_rate is missing"),
    "tokens": (BASE + "tokens: {pad_token: '<a>'}\n", "gives the tokenizer's own tokens other names"),
    "peft": (BASE + LORA + "peft:\n  backend: torchao\n  weight_dtype: int4\n", "bases in int4 of torchao"),
    "simpo": (
        BASE.replace("type: alpaca", "type: chatml.ultra") + "rl: simpo\ndpo_label_smoothing: 0.1\n",
        "simpo has no such term here",
    ),
    "losses": (
        BASE.replace("type: alpaca", "type: chatml.intel") + "rl: dpo\ndpo_loss_type: [sigmoid, aot]\n",
        "mixes losses",
    ),
    "batch": (
        BASE.replace("gradient_accumulation_steps: 2", "batch_size: 6"),
        "is no multiple of micro_batch_size = 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_another_model_is_refused_at_its_line(name: str, tmp_path: Path) -> None:
    text, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)
    if "missing" not in said and "neither" not in said:
        assert all(problem.line for problem in caught.value.problems), str(caught.value)


def test_a_share_of_a_split_needs_its_rows(tmp_path: Path) -> None:
    """Of a file: the hub's library knows shares of its own data sets."""
    text = BASE.replace("teknium/GPT4-LLM-Cleaned", "rows.jsonl")
    text = text.replace("    type: alpaca", "    type: alpaca\n    split: train[:20%]")
    with pytest.raises(
        RecipeError, match=r"of 20 %: rows are counted here  say how many.* --set data.train.0.max_rows=N"
    ):
        made(tmp_path, text)
    recipe = loaded(made(tmp_path, text, overrides=("data.train.0.max_rows=300",)))
    assert recipe.data.train[0].max_rows == 300


@pytest.mark.parametrize(
    ("split", "refusal"),
    [
        ("train", None),
        ("train[:50]", None),
        ("validation", "is a file, which has no split validation"),
    ],
)
def test_splits_of_files(split: str, refusal: str | None, tmp_path: Path) -> None:
    text = BASE.replace("teknium/GPT4-LLM-Cleaned", "rows.jsonl").replace(
        "    type: alpaca", f"    type: alpaca\n    split: {split}"
    )
    if refusal:
        with pytest.raises(RecipeError, match=refusal):
            made(tmp_path, text)
        return
    [source] = loaded(made(tmp_path, text)).data.train
    assert (source.split, source.max_rows) == (None, 50 if "[" in split else None)
    several = text.replace("path: rows.jsonl", "path: json\n    data_files: [a.jsonl, b.jsonl]")
    if "[" in split:
        with pytest.raises(RecipeError, match="is a part of a split"):
            made(tmp_path, several)
    else:
        assert [source.path for source in loaded(made(tmp_path, several)).data.train] == ["a.jsonl", "b.jsonl"]


def test_kto_asks_the_registry(tmp_path: Path) -> None:
    text = BASE.replace("type: alpaca", "type: llama3.ultra") + "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\n"
    expected = {
        "objective.name": "kto",
        "objective.beta": 0.5,
        "objective.desirable_weight": 0.2,
        "objective.undesirable_weight": 1.0,
        "data.train.0.format": "unpaired",
        "data.train.0.columns": {"prompt": "instruction", "completion": "output"},
        "data.chat_template": "llama3",
        "data.packing": False,
        "data.max_length": 2048,
    }
    assert values(loaded(made(tmp_path, text)), expected) == expected
    with pytest.raises(RecipeError, match="KTO is not trained here  objectives here: sft, dpo"):
        made(tmp_path, text, registries=without("objective", "kto"))
    with pytest.raises(RecipeError, match="rows of format unpaired are not read here"):
        made(tmp_path, text, registries=without("formats", "unpaired"))
    with pytest.raises(RecipeError, match="is no form of judged answers that is known"):
        made(tmp_path, text.replace("llama3.ultra", "llama3.icr"))


def test_gpus_are_stated_or_assumed_aloud(tmp_path: Path) -> None:
    assumed, stated = made(tmp_path, BASE), made(tmp_path, BASE, gpus=4)
    assert "1 GPU, as the file does not say" in " ".join(assumed.changed["train.global_batch_size"])
    assert loaded(assumed).train.global_batch_size == 8
    assert "4 GPUs (--gpus)" in " ".join(stated.changed["train.global_batch_size"])
    assert loaded(stated).train.global_batch_size == 32
    per_gpu = made(tmp_path, BASE.replace("gradient_accumulation_steps: 2", "batch_size: 12"), gpus=2)
    assert loaded(per_gpu).train.global_batch_size == 24


def test_gpus_that_share_a_micro_batch_count_once(tmp_path: Path) -> None:
    text = BASE + "tensor_parallel_size: 2\ncontext_parallel_size: 2\ndp_shard_size: 2\n"
    imported = made(tmp_path, text, gpus=8)
    assert loaded(imported).train.global_batch_size == 16
    assert "8 GPUs (--gpus), of which 4 share a micro-batch" in " ".join(imported.changed["train.global_batch_size"])
    assert {"tensor_parallel_size", "context_parallel_size", "dp_shard_size"} <= keys(imported.left)
    assumed = made(tmp_path, text)
    assert "1 group of 4 GPUs" in " ".join(assumed.changed["train.global_batch_size"])
    with pytest.raises(RecipeError, match="--gpus 6 is no multiple of the 4 GPUs that share a micro-batch"):
        made(tmp_path, text, gpus=6)


def test_an_unknown_key_is_listed_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    imported = made(tmp_path, BASE + "lora_rr: 3\nfoo:\n  bar: 1\nhub_secret: xyz\n")
    assert keys(imported.unknown) == {"lora_rr", "foo", "hub_secret"}
    text = imported.toml
    assert "Not known to this importer:" in text
    assert "lora_rr = 3" in text
    assert "did you mean lora_r?" in text
    assert '{"bar": 1}' in text
    assert "xyz" not in text
    assert "hub_secret = ***" in text


def test_settings_of_an_adapter_without_one_are_listed(tmp_path: Path) -> None:
    imported = made(tmp_path, BASE + LORA.replace("adapter: lora\n", ""))
    assert loaded(imported).method.name == "full"
    assert {"lora_r", "lora_alpha", "lora_target_linear"} <= keys(imported.left)
