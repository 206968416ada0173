"""A job's folder is looked at as the server has it done: check's words, the plan's verdict, and both where it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distft.service.examine import examine
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


def examined(path: Path, base: ServedBase, method: dict[str, Any], *rows: Any) -> dict[str, Any]:
    folder = JobFolder(path=path / "jobs" / "ftjob-a")
    request = {"base": base.model_dump_json(), "layout": (1, 1), "method": method, "seed": 1, "integrations": None}
    folder.make({**request, "line_bytes": 10_000})
    (folder.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return examine(folder)


def test_a_job_that_does_not_fit_has_the_advice_beside_what_check_found(tmp_path: Path) -> None:
    base = ServedBase(path="demo:tiny-llama", chat_template="plain", gpu="0.65", recipe={
        "method": {"name": "full"}, "model": {"init": "random"}, "train": {"micro_batch_size": 8}})  # fmt: skip
    hyperparameters = {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0}
    found = examined(
        tmp_path, base, {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}, *[ROW] * 8
    )
    assert found["error"]["code"] == "does_not_fit"
    message = found["error"]["message"]
    assert "DOES NOT FIT" in message
    assert "micro_batch_size" in message, "the planner's advice"
    assert str(tmp_path) not in message
    events = [(event["level"], event["message"]) for event in found["events"]]
    assert events[0][1].startswith("Training file: 8 rows"), "check's words are kept"
    assert next(text for level, text in events if level == "error").startswith("DOES NOT FIT")
    assert {level for level, _ in events[-2:]} == {"error"}
