"""DPO side by side with TRL's DPOTrainer: the same model, pairs, batches and settings, in one run.

    python benchmarks/preferences.py [--rounds 2] [--steps 14] [--out FILE.json]

Each contestant trains in a fresh process; the order is A B C … C B A, round after round. Eight pairs to a step, in the
order of the file; losses of full fine-tuning must agree at every step, else the row is void (adapters start from other
random numbers in each library). TRL runs tuned: no activation checkpointing,
fused AdamW, and its reference computed before training under full fine-tuning, as here. `distft-packed` has the same
pairs in packed sequences, so other pairs to a step: a rate without losses to compare. The figure is real tokens per
second over the measured steps' median time, as a ratio to TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kit
from peers import CONFIG, WARM_UP

BATCH, LENGTH, RATE, BETA = 8, 512, 1e-4, 0.1
TOLERANCE = 1e-3
METHODS = {"full": 'method={name="full"}', "lora": 'method={name="lora", r=16, alpha=32}'}
CONTESTANTS = [f"{who}-{method}" for method in METHODS for who in ("distft", "distft-packed", "trl")]
RECIPE = """
name = "ours-{pid}"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
dtype = "float32"
[objective]
name = "dpo"
beta = {beta}
[data]
max_length = {length}
packing = {packing}
shuffle = false
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/rows.jsonl"
format = "preference"
[optim]
learning_rate = {rate}
[schedule]
name = "constant"
[train]
max_steps = {steps}
global_batch_size = {batch}
micro_batch_size = {batch}
[engine]
name = "solo"
[log]
tensorboard = false
console = "off"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--steps", type=int, default=14, help=f"optimizer steps; the first {WARM_UP} warm up")
    options.add_argument("--out")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        work(chosen.worker[0], Path(chosen.worker[1]), chosen.steps)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), chosen.steps)
        for round_ in range(chosen.rounds):
            for name in CONTESTANTS if round_ % 2 == 0 else reversed(CONTESTANTS):
                found[name].append(launched(name, folder, chosen.steps))
                print(f"round {round_ + 1}: {name}", file=sys.stderr)
    table = [row(name, found, f"trl-{name.rpartition('-')[2]}") for name in CONTESTANTS]
    kit.finish({"benchmark": "preferences", "steps": chosen.steps, "table": table}, chosen.out)


def row(name: str, found: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """A contestant's figures, rounds together, against TRL's."""

    def rate(of: str) -> float:
        steps = [second for run in found[of] for second in run["step_s"][WARM_UP:]]
        return found[of][0]["tokens"] / len(found[of][0]["step_s"]) / kit.quantiles(steps)["median"]

    pairs = zip(found[name][0]["losses"], found[reference][0]["losses"], strict=True)
    difference = None if "packed" in name else max(abs(a - b) / abs(b) for a, b in pairs)
    return {
        "name": name,
        "tokens_per_s_ratio": rate(name) / rate(reference),
        "step_s": kit.quantiles([second for run in found[name] for second in run["step_s"][WARM_UP:]]),
        "tokens": found[name][0]["tokens"],
        "peak_rss_mib": max(run["peak_rss_mib"] for run in found[name]),
        "largest_loss_difference": difference,
        "void": name.endswith("full") and difference is not None and difference > TOLERANCE,
    }


def prepare(folder: Path, steps: int) -> None:
    """One model's weights and one file of pairs for everybody, of lengths as people's are: many short, few long."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distft.demo.files import locate_path

    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=LENGTH)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((Path(locate_path("demo:tiny-llama")) / name).read_bytes())
    rng = random.Random(5)

    def words(mean: float, most: int) -> str:
        count = min(most, int(rng.lognormvariate(mean, 0.7)) + 3)
        return " ".join(rng.choice(kit.WORDS) for _ in range(count))

    rows = [
        {"prompt": words(2.6, 40), "chosen": " " + words(3.2, 55), "rejected": " " + words(3.2, 55)}
        for _ in range(steps * BATCH * 4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def launched(name: str, folder: str, steps: int) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", name, folder, "--steps", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, folder: Path, steps: int) -> None:
    """One contestant, in this process."""
    who, _, method = name.rpartition("-")
    figures = theirs(method, folder, steps) if who == "trl" else ours(method, folder, steps, packed="packed" in who)
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def ours(method: str, folder: Path, steps: int, *, packed: bool) -> dict[str, Any]:
    path = folder / f"recipe-{packed}.toml"
    values = {"folder": folder, "length": LENGTH, "packing": str(packed).lower(), "rate": RATE, "steps": steps}
    batch = 4 if packed else BATCH  # about as many pairs
    path.write_text(RECIPE.format(**values, batch=batch, beta=BETA, pid=os.getpid()), encoding="utf-8")
    run = kit.Run(recipe_file=path, overrides=[METHODS[method]])
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        run.go(1)
        seconds.append(time.perf_counter() - begin)
    run.close()
    return {"step_s": seconds, "losses": run.losses(), "tokens": run.state.tokens}


def theirs(method: str, folder: Path, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(42)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.since = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.since = self.since or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

    clock = Clock()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][: steps * BATCH]
    trainer = DPOTrainer(
        model=str(folder / "model"),
        args=DPOConfig(
            output_dir=str(folder / "theirs"), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, train_sampling_strategy="sequential",
            optim="adamw_torch_fused", adam_beta2=0.999, gradient_checkpointing=False, max_length=LENGTH, beta=BETA,
            precompute_ref_log_probs=method == "full", model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        if method == "lora"
        else None,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [each["prompt"] + each[side] for each in rows for side in ("chosen", "rejected")]
    tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    return {"step_s": clock.seconds, "losses": losses, "tokens": tokens}


if __name__ == "__main__":
    main()
