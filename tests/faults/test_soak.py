"""Thirty faults, one run: killed, stopped, starved of disk and corrupted at random, always the same command line."""

import hashlib
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from forks import Forks
from harness import Bench, Job

SEED = int(os.environ.get("DISTFT_SOAK_SEED", "7"))
FAULTS = int(os.environ.get("DISTFT_SOAK_FAULTS", "30"))
STEPS = 3 * FAULTS
KILL_POINTS = ("data", "agree", "forward", "backward", "update", "step", "eval", *(f"P{n}" for n in range(10)))
KINDS = ("kill", "kill", "kill", "term", "usr1", "raise", "enospc", "flip")

SETTINGS = (
    f"train.max_steps={STEPS}",
    "checkpoint.best=true",
    "eval.every_steps=5",
    "log.samples=true",
    "data.packing=false",
    'method.name="lora"',
    "method.r=4",
    "method.dropout=0.1",
    "optim.learning_rate=3e-3",
    "guard.hang_timeout_s=60",
)


def reached(folder: Path) -> int:
    """Last step with a line in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
    return max(steps, default=0)


def flip_a_byte(folder: Path, rng: random.Random) -> str | None:
    """In some file of the newest checkpoint, when it is not the only one."""
    found = sorted(folder.glob("checkpoints/step-????????"))
    if len(found) < 2:
        return None
    victim = rng.choice([path for path in sorted(found[-1].iterdir()) if path.stat().st_size])
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return f"{found[-1].name}/{victim.name}"


def ended(folder: Path) -> tuple[list[tuple[float, float, float]], float, str]:
    """(loss, norm and rate of each step, last evaluation, sha256 of the final tensors)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1)), "each step once"
    tensors = hashlib.sha256((folder / "final/adapter_model.safetensors").read_bytes()).hexdigest()
    evals = [record["eval_loss"] for record in records if "eval_loss" in record]
    return [(r["loss"], r["grad_norm"], r["lr"]) for r in steps], evals[-1], tensors


def rows_by_epoch(folder: Path, per_epoch: int) -> list[Counter[str]]:
    """How often each row was trained on, epoch by epoch; the last one may be short."""
    by_step: dict[int, list[str]] = {}
    for file in sorted((folder / "samples").glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            by_step.setdefault(line["step"], []).extend(line["rows"])
    # ranks take turns within a step, so an epoch's border inside one is found by counting
    seen = [row for step in sorted(by_step) for row in by_step[step]]
    whole = len(seen) // per_epoch
    return [Counter(seen[at * per_epoch : (at + 1) * per_epoch]) for at in range(whole)]


@pytest.mark.slow
def test_thirty_faults_change_nothing(bench: Bench, forks: Forks) -> None:
    rng = random.Random(SEED)
    second = [json.dumps({"prompt": f"case {n}:", "completion": " region" * (n % 7 + 1)}) for n in range(21)]
    (bench.folder / "second.jsonl").write_text("\n".join(second) + "\n")
    sources = [f'{{path="{bench.folder}/{name}.jsonl", weight=1.0}}' for name in ("train", "second")]
    settings = (*SETTINGS, f"data.train=[{', '.join(sources)}]")
    oracle, run = (Job(bench, name, "zero3", settings) for name in ("soak-oracle", "soak"))
    assert forks.run(oracle, limit_s=1200) == [0, 0], forks.stderr()
    per_epoch = int(re.search(r"(\d+) rows, ", forks.stderr())[1])
    told: list[str] = []
    while len(told) < FAULTS:
        fault, plan = next_fault(rng, run.folder)
        codes = forks.run(run, fault=plan, limit_s=300)
        told.append(f"{fault} -> {codes}")
        assert codes != [0, 0], "the run is over before the faults are"
    assert forks.run(run, limit_s=1200) == [0, 0], forks.stderr()
    print("\n".join(told))
    assert ended(run.folder) == ended(oracle.folder)
    with_faults, without = rows_by_epoch(run.folder, per_epoch), rows_by_epoch(oracle.folder, per_epoch)
    assert with_faults == without
    assert with_faults or FAULTS < 30, "at least one whole epoch"
    assert all(set(epoch.values()) == {1} for epoch in with_faults), "every row once in every epoch"


def next_fault(rng: random.Random, folder: Path) -> tuple[str, str]:
    """(what to tell, what to inject). Its start ends a step later in any case: what is planned for a point that this
    step does not come to (a save, an evaluation) never fires.
    """
    kind, told = rng.choice(KINDS), ""
    if kind == "flip":
        kind, told = "kill", f"a flipped bit in {flip_a_byte(folder, rng)}, then "
    step = reached(folder) + rng.randint(1, 2)
    point = rng.choice(KILL_POINTS[-10:] if kind == "enospc" else KILL_POINTS)
    plan = f"{kind}:rank={rng.randint(0, 1)},step={step},point={point}"
    return told + plan, f"{plan};kill:rank={rng.randint(0, 1)},point=step,step={step + 1}"
