"""Files of TRL's command line: what they become, and for which command they are."""

from pathlib import Path
from typing import Any

import pytest
from import_kit import keys, loaded, made, values, without

from distft.core.errors import RecipeError

BASE = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
output_dir: Qwen2.5-0.5B-SFT
"""
PAIRS = BASE.replace("trl-lib/Capybara", "trl-lib/ultrafeedback_binarized")
PEFT = "use_peft: true\nlora_r: 32\nlora_alpha: 16\n"

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "handbook-mixture": (
        BASE.replace("dataset_name: trl-lib/Capybara\n", "")
        + "dataset_mixture:\n  datasets:\n  - id: org/one\n    config: default\n    split: train_sft\n"
        "    columns: [messages]\n    weight: 1.0\n  - {id: org/two, weight: 0.5}\n"
        "  test_split_size: 1000\n  seed: 0\n",
        {},
        {
            "data.train.0.path": "org/one",
            "data.train.0.subset": "default",
            "data.train.0.split": "train_sft",
            "data.train.0.weight": 1.0,
            "data.train.1.path": "org/two",
            "data.train.1.weight": 0.5,
        },
        {"dataset_mixture.test_split_size"},
    ),
    "handbook-mixer": (
        BASE.replace("dataset_name: trl-lib/Capybara\n", "")
        + "dataset_mixer: {org/one: 1.0}\ndataset_splits: [train_sft, test_sft]\neval_strategy: epoch\n",
        {},
        {"data.train.0.split": "train_sft", "data.eval.0.path": "org/one", "data.eval.0.split": "test_sft"},
        set(),
    ),
    "example": (
        """
        model_name_or_path:
          Qwen/Qwen2.5-0.5B
        dataset_name:
          stanfordnlp/imdb
        report_to:
          none
        learning_rate:
          0.0001
        lr_scheduler_type:
          cosine
        """,
        {},
        {
            "objective.name": "sft",
            "optim.learning_rate": 1e-4,
            "schedule.name": "cosine",
            "train.epochs": 3.0,
            "train.global_batch_size": 8,
            "data.max_length": 1024,
            "data.packing": False,
            "data.loss_on": "all",
            "data.long_rows": "truncate",
            "model.dtype": "bfloat16",
            "method.name": "full",
            "train.activation_checkpointing": "full",
        },
        set(),
    ),
    "sft-packed": (
        BASE + "packing: true\nmax_length: 4096\neos_token: '<|im_end|>'\nattn_implementation: flash_attention_2\n"
        "dtype: bfloat16\ngradient_checkpointing: true\neval_strategy: steps\neval_steps: 100\n"
        "gradient_checkpointing_kwargs:\n  use_reentrant: false\n",
        {},
        {
            "data.packing": True,
            "data.max_length": 4096,
            "train.global_batch_size": 16,
            "data.eval.0.split": "test",
            "eval.every_steps": 100,
            "name": "Qwen2.5-0.5B-SFT",
            "output_dir": ".",
        },
        {"eos_token", "attn_implementation", "gradient_checkpointing_kwargs"},
    ),
    "sft-lora": (
        BASE
        + PEFT
        + "lora_target_modules: [q_proj, v_proj]\nassistant_only_loss: true\nlora_modules_to_save: [lm_head]\n",
        {},
        {
            "method.name": "lora",
            "method.r": 32,
            "method.alpha": 16.0,
            "method.dropout": 0.05,
            "method.target_modules": ["q_proj", "v_proj"],
            "method.modules_to_save": ["lm_head"],
            "data.loss_on": "assistant",
        },
        set(),
    ),
    "sft-qlora": (
        BASE
        + PEFT
        + "load_in_4bit: true\nuse_bnb_nested_quant: true\ncompletion_only_loss: true\noptim: adamw_bnb_8bit\n"
        "lora_target_modules: all-linear\nuse_dora: false\n",
        {},
        {
            "method.name": "qlora",
            "method.quant.double": True,
            "data.loss_on": "completion",
            "optim.name": "adamw_8bit",
            "method.target_modules": "all-linear",
        },
        set(),
    ),
    "sft-text": (
        BASE + "dataset_text_field: content\ndataset_config: en\ndataset_train_split: train[:500]\nmax_steps: 20\n"
        "warmup_steps: 0.1\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 2.0e-5}\n",
        {},
        {
            "data.train.0.format": "text",
            "data.train.0.columns": {"content": "text"},
            "data.train.0.subset": "en",
            "data.train.0.max_rows": 500,
            "data.loss_on": "all",
            "train.max_steps": 20,
            "schedule.warmup_ratio": 0.1,
            "schedule.min_ratio": pytest.approx(0.1),
        },
        {"num_train_epochs"},
    ),
    "sft-mixture": (
        """
        model_name_or_path: Qwen/Qwen2.5-0.5B
        datasets:
          - path: trl-lib/Capybara
          - path: json
            data_files: rows.jsonl
          - path: open-r1/Mixture
            name: all
            split: part
        test_split_size: 0.1
        max_length: 2048
        output_dir: out/mix
        fsdp: [full_shard, auto_wrap]
        fsdp_config:
          fsdp_sharding_strategy: HYBRID_SHARD
        """,
        {"task": "sft"},
        {
            "data.train.1.path": "rows.jsonl",
            "data.train.2.subset": "all",
            "data.train.2.split": "part",
            "engine.name": "fsdp2",
        },
        {"test_split_size"},
    ),
    "dpo": (
        PAIRS
        + "beta: 0.1\nloss_type: sigmoid\nmax_prompt_length: 512\nmax_length: 1024\nprecompute_ref_log_probs: true\n"
        "f_divergence_type: reverse_kl\n",
        {},
        {
            "objective.name": "dpo",
            "objective.beta": 0.1,
            "data.max_length": 2048,
            "data.train.0.format": "preference",
            "data.packing": False,
            "optim.learning_rate": 2e-4,
        },
        {"max_prompt_length", "precompute_ref_log_probs"},
    ),
    "dpo-by-task": (
        PAIRS.replace("learning_rate: 2.0e-4\n", "") + "beta: 0.5\nloss_type: ipo\n",
        {"task": "dpo"},
        {"objective.loss": "ipo", "objective.beta": 0.5, "optim.learning_rate": 1e-6},
        set(),
    ),
    "dpo-rpo": (
        PAIRS + "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.5]\n",
        {},
        {"objective.loss": "sigmoid", "objective.sft_weight": 0.5},
        set(),
    ),
    "orpo": (
        PAIRS + "beta: 0.2\n",
        {"task": "orpo"},
        {"objective.name": "orpo", "objective.beta": 0.2},
        set(),
    ),
    "simpo": (
        PAIRS + "loss_type: simpo\nbeta: 2.0\nsimpo_gamma: 1.0\ncpo_alpha: 0.0\n",
        {},
        {"objective.name": "simpo", "objective.beta": 2.0, "objective.gamma": 1.0, "objective.sft_weight": 0.0},
        set(),
    ),
    "cpo": (
        PAIRS + "cpo_alpha: 0.7\n",
        {},
        {"objective.name": "cpo", "objective.sft_weight": 0.7, "objective.beta": 0.1},
        set(),
    ),
    "reward": (
        PAIRS + "center_rewards_coefficient: 0.01\n" + PEFT,
        {},
        {"objective.name": "reward", "objective.center": 0.01, "method.name": "lora"},
        set(),
    ),
    "grpo": (
        BASE.replace("per_device_train_batch_size: 2", "per_device_train_batch_size: 8")
        + "reward_funcs: [think_format_reward, my.rewards.polite]\nreward_weights: [1, 0.5]\nnum_generations: 4\n"
        "max_completion_length: 128\nepsilon_high: 0.28\nscale_rewards: false\nlog_completions: true\nbeta: 0.04\n"
        "num_iterations: 2\ntop_p: 0.9\nmask_truncated_completions: true\neval_strategy: steps\n" + PEFT,
        {"gpus": 2},
        {
            "objective.name": "grpo",
            "objective.loss": "dapo",
            "objective.clip_low": 0.2,
            "objective.clip_high": 0.28,
            "objective.scale": "none",
            "objective.beta": 0.04,
            "objective.correction": "none",
            "rollout.answers_per_prompt": 4,
            "rollout.max_new_tokens": 128,
            "rollout.updates": 2,
            "rollout.top_p": 0.9,
            "rollout.mask_truncated": True,
            "rollout.rewards.0.function": "trl.rewards:think_format_reward",
            "rollout.rewards.0.weight": 1.0,
            "rollout.rewards.1.name": "trl_function",
            "rollout.rewards.1.function": "my.rewards:polite",
            "rollout.rewards.1.weight": 0.5,
            "data.max_length": 4 * (512 + 128),
            "data.train.0.format": "prompt",
            "train.global_batch_size": 8 * 8 * 2 // 4,
            "method.dropout": 0.0,
        },
        {"log_completions"},
    ),
    "grpo-vllm": (
        BASE + "reward_model_name_or_path: org/reward\nloss_type: grpo\nimportance_sampling_level: sequence\n"
        "use_vllm: true\nvllm_server_base_url: http://10.0.0.7:8000/\nvllm_importance_sampling_mode: token_truncate\n"
        "num_generations: 16\nuse_peft: true\n",
        {},
        {
            "objective.loss": "gspo",
            "objective.correction": "token",
            "objective.correction_outside": "truncate",
            "objective.correction_cap": 3.0,
            "rollout.generator.name": "vllm",
            "rollout.generator.url": "http://10.0.0.7:8000",
            "rollout.rewards.0.name": "reward_model",
            "rollout.rewards.0.path": "org/reward",
            "train.global_batch_size": 1,
        },
        set(),
    ),
    "handbook": (
        """
        model_name_or_path: alignment-handbook/zephyr-7b-sft-full
        torch_dtype: bfloat16
        dataset_name: HuggingFaceH4/ultrafeedback_binarized
        dataset_train_split: train_prefs
        dataset_test_split: test_prefs
        bf16: true
        beta: 0.01
        do_eval: true
        eval_strategy: steps
        eval_steps: 100
        gradient_accumulation_steps: 2
        gradient_checkpointing: true
        hub_model_id: zephyr-7b-dpo-full
        hub_token: hf_abcdef
        learning_rate: 5.0e-7
        log_level: info
        logging_steps: 10
        lr_scheduler_type: cosine
        max_length: 1024
        max_prompt_length: 512
        num_train_epochs: 1
        optim: adamw_torch
        output_dir: data/zephyr-7b-dpo-full
        per_device_train_batch_size: 8
        per_device_eval_batch_size: 8
        push_to_hub: true
        report_to: [wandb, trackio]
        save_strategy: steps
        save_steps: 100
        save_total_limit: 1
        seed: 42
        warmup_ratio: 0.1
        """,
        {"task": "dpo", "gpus": 8},
        {
            "train.global_batch_size": 128,
            "data.train.0.split": "train_prefs",
            "data.eval.0.split": "test_prefs",
            "eval.every_steps": 100,
            "log.wandb": "huggingface",
            "checkpoint.every_steps": 100,
            "checkpoint.keep": 2,
            "objective.beta": 0.01,
            "data.max_length": 2048,
            "output_dir": "data",
            "name": "zephyr-7b-dpo-full",
        },
        {"hub_model_id", "hub_token", "push_to_hub", "report_to", "max_prompt_length", "log_level"},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    text, options, expected, left = CONFIGS[name]
    imported = made(tmp_path, text, **options)
    assert imported.tool == "trl"
    assert values(loaded(imported), expected) == expected
    assert left <= keys(imported.left)
    assert not imported.unknown
    assert "hf_abcdef" not in imported.toml


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "shared": (PAIRS + "beta: 0.1\n", {}, "beta, which dpo, orpo, cpo and others share"),
    "two": (PAIRS + "cpo_alpha: 1.0\npacking: true\n", {}, "has keys of sft and of cpo"),
    "task": (PAIRS, {"task": "ppo"}, "--task ppo has no importer  known: sft, dpo"),
    "no-reward": (PAIRS, {"task": "grpo"}, "there is no reward"),
    "answers": (BASE + "reward_funcs: [a.b]\nnum_generations: 5\n", {}, "16 answers a step are no multiple"),
    "top_k": (BASE + "reward_funcs: [a.b]\ntop_k: 50\n", {}, "answers are drawn by top_p alone"),
    "sapo": (BASE + "reward_funcs: [a.b]\nloss_type: sapo\n", {}, "loss sapo is not trained here"),
    "overlong": (BASE + "reward_funcs: get_soft_overlong_punishment\n", {}, "is not taken over"),
    "weights": (BASE + "reward_funcs: [a.b]\nreward_weights: [1, 2]\n", {}, "a number for each of the 1 rewards"),
    "sequence": (
        BASE + "reward_funcs: [a.b]\nimportance_sampling_level: sequence\n",
        {},
        "is GSPO with loss_type: grpo alone here",
    ),
    "neftune": (BASE + "neftune_noise_alpha: 5\n", {}, "NEFTune adds noise"),
    "dft": (BASE + "loss_type: dft\n", {"task": "sft"}, "is another loss, which is not here"),
    "aot": (PAIRS + "loss_type: aot\n", {}, "loss aot is not trained here"),
    "mpo": (
        PAIRS + "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\n",
        {"task": "dpo"},
        "mixes losses",
    ),
    "alphapo": (PAIRS + "loss_type: alphapo\ncpo_alpha: 1.0\n", {}, "is not a loss of cpo here"),
    "4bit": (BASE + "load_in_4bit: true\n", {}, "full fine-tuning needs a base in 16 or 32 bits"),
    "keep_end": (BASE + "truncation_mode: keep_end\n", {}, "keeps the ends of long rows"),
    "js": (PAIRS + "f_divergence_type: js_divergence\n", {}, "other divergences than reverse KL"),
    "sync": (PAIRS + "sync_ref_model: true\n", {}, "a reference that moves"),
    "data": ("model_name_or_path: a/b\nmax_length: 512\n", {}, "there is no dataset"),
    "files": (
        "model_name_or_path: a/b\ndatasets:\n  - path: a/b\n    data_files: x.jsonl\n",
        {},
        "chooses files of a hub",
    ),
    "polynomial": (BASE + "lr_scheduler_type: polynomial\n", {}, "is not a schedule here"),
    "wsd": (BASE + "lr_scheduler_type: warmup_stable_decay\n", {}, "needs num_decay_steps in lr_scheduler_kwargs"),
    "online": (BASE + "num_ppo_epochs: 4\n", {}, "belongs to PPO, RLOO or distillation"),
    "dtype": (BASE + "dtype: float15\n", {}, "is none of the known values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_another_model_is_refused(name: str, tmp_path: Path) -> None:
    text, options, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text, **options)
    assert said in str(caught.value)


def test_a_decay_of_known_length_is_a_share(tmp_path: Path) -> None:
    text = BASE + (
        "max_steps: 200\nlr_scheduler_type: warmup_stable_decay\nwarmup_steps: 10\n"
        "lr_scheduler_kwargs: {num_decay_steps: 50, decay_type: linear, min_lr_ratio: 0.1}\n"
    )
    expected = {
        "schedule.name": "wsd",
        "schedule.decay_ratio": 0.25,
        "schedule.min_ratio": 0.1,
        "schedule.warmup_steps": 10,
    }
    assert values(loaded(made(tmp_path, text)), expected) == expected


@pytest.mark.parametrize(
    ("more", "task"),
    [
        ("loss_type: nll\n", "sft"),
        ("loss_type: exo_pair\nlabel_smoothing: 0.01\n", "dpo"),
        ("loss_type: simpo\n", "simpo"),
        ("reference_free: false\n", "dpo"),
        ("completion_only_loss: true\n", "sft"),
    ],
)
def test_the_command_is_read_from_what_it_alone_has(more: str, task: str, tmp_path: Path) -> None:
    imported = made(tmp_path, PAIRS + more)
    assert loaded(imported).objective.name == task
    assert "read from the keys of the file" in " ".join(imported.changed["objective.name"])


@pytest.mark.parametrize("more", ["precompute_ref_log_probs: true\n", "max_prompt_length: 5\n", "loss_type: ipo\n"])
def test_keys_that_commands_share_do_not_decide(more: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it is not clear which command it is for  say --task"):
        made(tmp_path, PAIRS + more)


@pytest.mark.parametrize("task", ["kto", "bco"])
def test_unpaired_objectives_ask_the_registry(task: str, tmp_path: Path) -> None:
    text = PAIRS + "beta: 0.3\n" + ("desirable_weight: 2.0\nloss_type: apo_zero_unpaired\n" if task == "kto" else "")
    expected = {"objective.name": task, "objective.beta": 0.3, "data.train.0.format": "unpaired"}
    if task == "kto":
        expected |= {"objective.desirable_weight": 2.0, "objective.loss": "apo_zero"}
    assert values(loaded(made(tmp_path, text, task=task)), expected) == expected
    with pytest.raises(RecipeError, match=f"{task.upper()} is not trained here"):
        made(tmp_path, text, task=task, registries=without("objective", task))
