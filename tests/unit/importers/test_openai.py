"""Jobs of OpenAI's fine-tuning API as JSON: what is sent, and what is answered."""

import json
from pathlib import Path
from typing import Any

import pytest
from import_kit import keys, loaded, made, values

from distft.core.errors import RecipeError

OPEN = ("model.path=Qwen/Qwen2.5-7B-Instruct", "data.train.0.path=rows.jsonl")
SENT = {
    "model": "gpt-4.1-mini-2025-04-14",
    "training_file": "file-abc123",
    "suffix": "my bot!",
    "seed": 7,
    "metadata": {"team": "support"},
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.5}},
    },
    "integrations": [{"type": "wandb", "wandb": {"project": "tuning", "tags": ["a"]}}],
}
ANSWERED = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "created_at": 1721764800,
    "finished_at": None,
    "fine_tuned_model": "ft:gpt-4o-mini:acme::9x",
    "organization_id": "org-1",
    "result_files": ["file-res"],
    "status": "succeeded",
    "trained_tokens": 5768,
    "error": {},
    "model": "gpt-4o-mini-2024-07-18",
    "training_file": "file-abc123",
    "validation_file": "file-def456",
    "seed": 683058546,
    "estimated_finish": None,
    "integrations": [],
    "hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    "metadata": None,
    "user_provided_suffix": "bot",
}
DPO = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "training_file": "pairs.jsonl",
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto", "batch_size": "auto"}}},
}

CHECK = {
    "type": "multi",
    "name": "both",
    "calculate_output": "0.5 * a + 0.5 * b",
    "graders": {
        "a": {"type": "string_check", "name": "a", "operation": "eq", "input": "{{sample.output_text}}",
              "reference": "{{item.answer}}"},
        "b": {"type": "text_similarity", "name": "b", "evaluation_metric": "rouge_l",
              "input": "{{sample.output_text}}", "reference": "{{item.answer}}"},
    },
}  # fmt: skip
REINFORCEMENT = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "training_file": "asked.jsonl",
    "validation_file": "held.jsonl",
    "method": {
        "type": "reinforcement",
        "reinforcement": {
            "grader": CHECK,
            "hyperparameters": {
                "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 2.0, "compute_multiplier": 0.5,
                "eval_interval": 5, "eval_samples": 10, "reasoning_effort": "default",
            },
        },
    },
}  # fmt: skip

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any], set[str]]] = {
    "supervised": (
        SENT,
        OPEN,
        {
            "name": "my-bot",
            "model.path": "Qwen/Qwen2.5-7B-Instruct",
            "method.name": "lora",
            "objective.name": "sft",
            "data.train.0.format": "messages",
            "data.train.0.path": "rows.jsonl",
            "data.packing": False,
            "data.long_rows": "error",
            "data.loss_on": "assistant",
            "train.epochs": 2.0,
            "train.global_batch_size": 8,
            "optim.learning_rate": pytest.approx(3e-4),
            "seed": 7,
            "log.wandb": "tuning",
        },
        {"metadata", "integrations[0].wandb.tags"},
    ),
    "answered": (
        ANSWERED,
        (*OPEN, "data.eval.0.path=held.jsonl"),
        {
            "name": "bot",
            "train.epochs": 3.0,
            "train.global_batch_size": 1,
            "data.eval.0.path": "held.jsonl",
            "optim.learning_rate": pytest.approx(3.6e-4),
            "seed": 683058546,
        },
        {"fine_tuned_model", "status", "trained_tokens", "id"},
    ),
    "dpo": (
        DPO,
        (),
        {
            "objective.name": "dpo",
            "objective.beta": 0.2,
            "data.train.0.format": "preference",
            "train.epochs": 3.0,
            "train.global_batch_size": 16,
            "data.max_length": 8192,
            "optim.learning_rate": 5e-6,
            "name": "job",
        },
        set(),
    ),
    "reinforcement": (
        REINFORCEMENT,
        (),
        {
            "objective.name": "grpo",
            "data.train.0.format": "prompt",
            "objective.loss": "dapo",
            "rollout.answers_per_prompt": 4,
            "rollout.updates": 1,
            "rollout.rewards.0.name": "grader",
            "rollout.rewards.0.grader.calculate_output": "0.5 * a + 0.5 * b",
            "eval.answers.0.name": "validation",
            "eval.answers.0.path": "held.jsonl",
            "eval.answers.0.every_steps": 5,
            "eval.answers.0.max_rows": 10,
            "train.epochs": 2.0,
            "train.global_batch_size": 4,
            "optim.learning_rate": 2e-5,
        },
        set(),
    ),
    "reinforcement-without-rows-held-out": (
        {**REINFORCEMENT, "validation_file": None},
        (),
        {"objective.name": "grpo", "rollout.answers_per_prompt": 4, "data.packing": False},
        {
            "method.reinforcement.hyperparameters.eval_interval",
            "method.reinforcement.hyperparameters.eval_samples",
        },
    ),
    "old-form": (
        {
            "model": "meta-llama/Llama-3.1-8B-Instruct",
            "training_file": "a.jsonl",
            "hyperparameters": {"n_epochs": "auto"},
        },
        (),
        {"train.epochs": 3.0, "model.path": "meta-llama/Llama-3.1-8B-Instruct", "data.train.0.path": "a.jsonl"},
        set(),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_job_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    job, overrides, expected, left = CONFIGS[name]
    imported = made(tmp_path, json.dumps(job, indent=1), name="job.json", overrides=overrides)
    assert imported.tool == "openai"
    assert values(loaded(imported), expected) == expected
    assert left <= keys(imported.left)
    assert not imported.unknown
    assert all("had no effect" not in remark.text for remark in imported.left)


REFUSED = {
    "model": (
        {**SENT, "training_file": "a.jsonl"},
        (),
        "is OpenAI's, and cannot be had  name an open model: --set model.path=",
    ),
    "file": (
        {**SENT, "model": "Qwen/Qwen3-8B"},
        (),
        "is an id of a file of OpenAI's  download it, and name it: --set data.train.0",
    ),
    "grader": (
        {**SENT, "method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python", "source": ""}}}},
        OPEN,
        "a grader python runs code of users",
    ),
    "half-a-grader": (
        {**SENT, "method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check"}}}},
        OPEN,
        "grader",
    ),
    "no-grader": ({**SENT, "method": {"type": "reinforcement"}}, OPEN, "is missing: it says what an answer is worth"),
    "effort": (
        {
            **REINFORCEMENT,
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": CHECK, "hyperparameters": {"reasoning_effort": "high"}},
            },
        },
        (),
        "no model here is told how long to think",
    ),
    "type": ({**SENT, "method": {"type": "supervisd"}}, OPEN, 'did you mean "supervised"?'),
    "both": ({**SENT, "method": {"type": "dpo", "supervised": {}}}, OPEN, "belongs to another method than type = dpo"),
    "number": ({**DPO, "hyperparameters": {"n_epochs": "many"}, "method": {"type": "dpo"}}, (), "must be a number"),
    "twice": ({**ANSWERED, "hyperparameters": {"n_epochs": 4}}, OPEN, "says something else than method.supervised"),
    "list": ({**DPO, "method": ["dpo"]}, (), "must be a mapping of keys to values"),
    "override": (SENT, (*OPEN, "train.epcohs=3"), "unknown key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_or_trained_is_refused(name: str, tmp_path: Path) -> None:
    job, overrides, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, json.dumps(job, indent=1), name="job.json", overrides=overrides)
    assert said in str(caught.value)


def test_unknown_keys_are_listed_with_their_lines(tmp_path: Path) -> None:
    job = {**DPO, "service_tier": "flex"}
    imported = made(tmp_path, json.dumps(job, indent=1), name="job.json")
    assert [(remark.key, remark.line) for remark in imported.unknown] == [("service_tier", 14)]
