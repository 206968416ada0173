"""Tasks as lm-eval's YAML files hold them, over a few rows of our own: written, chosen, and a whole text."""

import json
from pathlib import Path
from typing import Any

import pytest

REASON = "lm-eval is not installed"
WORDS = ("disk", "queue", "login", "region", "cache", "deploy", "users")


def need_library() -> None:
    pytest.importorskip("lm_eval.evaluator", reason=REASON)


def task_files(folder: Path, rows: int = 6) -> dict[str, Path]:
    """Written to `folder`; every one of them has `rows` rows."""
    shown = [
        {"q": f"{WORDS[at % 7]} or {WORDS[(at + 3) % 7]}", "a": WORDS[at % 7], "wrong": WORDS[(at + 3) % 7] + " slow"}
        for at in range(2 * rows)
    ]
    data = {split: str(folder / f"lm_{split}.jsonl") for split in ("train", "test")}
    for split, part in (("train", shown[rows:]), ("test", shown[:rows])):
        Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "lm_cache")}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    made: dict[str, dict[str, Any]] = {
        "write": {
            "output_type": "generate_until",
            "training_split": "train",
            "fewshot_split": "train",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_target": " {{a}}",
            "num_fewshot": 2,
            "generation_kwargs": {"until": ["e"], "do_sample": False, "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_choice": "{{[a, wrong]}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{(q + ' ' + wrong + ' ') * 4}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
    }
    files = {}
    for name, own in made.items():
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(json.dumps({"task": name, "test_split": "test", **common, **own}))
    return files
