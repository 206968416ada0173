"""Rewards are judged in a process of their own: each fault is named, none counts as 0, none stops the others."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from data_kit import save_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from distft.core.errors import DistftError
from distft.recipe.rollout import RolloutTable
from distft.scores import Answer
from distft.step_sources.rewards import RewardProcess, rewards_of

FUNCTIONS = """
import os, subprocess, sys, time

def judge(text, row):
    if text == "raise": raise KeyError("colour")
    if text == "hang":
        while True: pass
    if text == "nan": return float("nan")
    if text == "text": return "good"
    if text == "many": return [1.0, 2.0]
    if text == "memory": return len(bytearray(64 << 30))
    if text == "exit": os._exit(3)
    if text == "kill": os.kill(os.getpid(), 9)
    if text == "fork":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # left behind by a reward"])
        time.sleep(600)
    if text == "print":
        print('{"values": [99.0]}', flush=True)
        return 0.25
    return 0.5
"""
FAULTS = {
    "raise": "raised KeyError", "hang": "took longer than 1 s", "nan": "returned float nan",
    "text": "returned str 'good'", "many": "returned list [1.0, 2.0]", "memory": "MemoryError",
    "exit": "ended its process with code 3", "kill": "ended its process by SIGKILL", "fork": "took longer than 1 s",
}  # fmt: skip


def process(rewards: list[dict[str, Any]]) -> RewardProcess:
    table = RolloutTable(rewards=tuple(rewards), reward_timeout_s=1.0)
    return RewardProcess(rewards_of(table), timeout_s=table.reward_timeout_s, memory_gib=table.reward_memory_gib)


def answers(texts: list[str]) -> list[Answer]:
    return [Answer(id=f"row {index}", row={}, reference="right", text=text) for index, text in enumerate(texts)]


def test_every_fault_is_named_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    judge = process([{"name": "exact_match"}, {"name": "function", "function": "my_rewards:judge", "figures": []}])
    texts = [text for fault in FAULTS for text in ("right", fault)] + ["print", "wrong"]
    began = time.monotonic()
    try:
        judged = judge.judge(answers(texts))
    finally:
        judge.close()
    for text, got in zip(texts, judged, strict=True):
        if text in FAULTS:
            assert FAULTS[text] in got.why, (text, got.why)
            assert not got.parts
        else:
            assert got.why == "", text
            assert got.parts == (float(text == "right"), 0.25 if text == "print" else 0.5), text
    assert time.monotonic() - began < 60
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(b"left behind by a reward" in command for command in commands)


def test_enough_faults_or_a_stop_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    judge = process([{"name": "function", "function": "my_rewards:judge", "figures": []}])
    asked = []
    try:
        judged = judge.judge(answers(["raise", "right", "raise", "hang", "hang"]), most_unscored=1)
        stopped = judge.judge(answers(["right"] * 4), stop=lambda: bool(asked) or asked.append(1))
    finally:
        judge.close()
    assert judged is not None
    assert [bool(one.why) for one in judged] == [True, False, True], "the rest is not waited for"
    assert stopped is None


def test_a_score_that_cannot_work_is_said_at_once() -> None:
    judge = process([{"name": "function", "function": "no_such_module:judge", "figures": []}])
    with pytest.raises(DistftError, match="no_such_module"):
        judge.judge(answers(["any"]))


def test_a_reward_model_is_loaded_before_the_clock_runs(tmp_path: Path) -> None:
    """Its library alone takes longer to import than an answer may take to judge."""
    save_tokenizer(tmp_path)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        eos_token_id=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    judge = process([{"name": "reward_model", "path": str(tmp_path), "dtype": "float32", "device": "cpu"}])
    try:
        judged = judge.judge(answers(["right", "wrong"]))
    finally:
        judge.close()
    assert [one.why for one in judged] == ["", ""]
    assert judged[0].parts != judged[1].parts


def test_names_weights_and_figures() -> None:
    table = RolloutTable(
        rewards=(
            {"name": "exact_match", "weight": 2.0},
            {"name": "field_match", "fields": ["a"], "form": "lines"},
            {"name": "field_match", "fields": ["b"], "form": "lines", "weight": -0.5},
        )
    )
    rewards = rewards_of(table)
    assert [reward.weight for reward in rewards] == [2.0, 1.0, -0.5]
    assert len({reward.name for reward in rewards}) == 3
    assert all("weight" not in reward.settings for reward in rewards)
    assert math.isclose(sum(reward.weight for reward in rewards), 2.5)
