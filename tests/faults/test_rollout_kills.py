"""Killed twenty times while it writes answers, judges them, trains on them and saves: it ends as if never killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
from forks import Forks
from harness import Bench, Job

SEED = int(os.environ.get("DISTFT_SOAK_SEED", "11"))
KILLS = int(os.environ.get("DISTFT_ROLLOUT_KILLS", "20"))
STEPS = KILLS + 6
SETTINGS = (
    f"train.max_steps={STEPS}", "train.micro_batch_size=2", "data.packing=false", "data.eval=[]", "data.max_length=272",
    'objective={name="ppo", beta=0.1}', 'method={name="lora", r=4}', "optim.learning_rate=3e-3",
    'rollout={answers_per_prompt=4, max_new_tokens=12, updates=3, rewards=[{name="regex", pattern="[aeiou]"}]}',
    "checkpoint.every_steps=2", "guard.hang_timeout_s=60",
)  # fmt: skip
WHILE = {
    "writing": ("eval", 12), "judging": ("rewards", 1), "reading": ("data", 1), "training": ("backward", 2),
    "updating": ("update", 1), "between updates": ("step", 1), "saving": (None, 1),
}  # fmt: skip
"""What is done meanwhile -> point of the run and how often it is met in a step, at most."""


def next_kill(rng: random.Random, folder: Path, kind: str) -> str:
    """What to inject while `kind` goes on; its start ends a step later in any case."""
    steps = [json.loads(line)["step"] for line in read(folder / "metrics.jsonl")]
    step = max(steps, default=0) + 1
    point, times = WHILE[kind]
    at = point or f"P{rng.randrange(10)}"
    rank = 0 if kind == "judging" else rng.randint(0, 1)
    last = f"kill:rank={rng.randint(0, 1)},point=step,step={step + 1}"
    return f"kill:rank={rank},point={at},step={step + rng.randint(0, 1)},skip={rng.randrange(times)};{last}"


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def ended(folder: Path) -> tuple[list[tuple[float, ...]], dict[str, str], str]:
    """Figures of each step, every rollout, and the weights."""
    records = [json.loads(line) for line in read(folder / "metrics.jsonl")]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "each step once"
    figures = [tuple(r[name] for name in ("loss", "grad_norm", "reward_total", "kl", "value")) for r in records]
    rollouts = {path.name: path.read_text() for path in sorted((folder / "rollouts").iterdir())}
    return figures, rollouts, hashlib.sha256((folder / "final/adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_twenty_kills_change_nothing(bench: Bench, forks: Forks) -> None:
    rng = random.Random(SEED)
    oracle, run = (Job(bench, name, "fsdp2", SETTINGS) for name in ("rollouts-oracle", "rollouts-killed"))
    assert forks.run(oracle, limit_s=1200) == [0, 0], forks.stderr()
    for number in range(KILLS):
        plan = next_kill(rng, run.folder, list(WHILE)[number % len(WHILE)])
        codes = forks.run(run, fault=plan, limit_s=300)
        assert codes != [0, 0], "the run is over before the kills are"
    assert forks.run(run, limit_s=1200) == [0, 0], forks.stderr()
    assert ended(run.folder) == ended(oracle.folder)
