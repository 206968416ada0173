"""Side by side with HF's Trainer and TRL's SFTTrainer: the same model, rows, batches and settings, in one run.

    python benchmarks/peers.py [--rounds 2] [--steps 14] [--rows FILE.jsonl] [--out FILE.json]

Each contestant trains in a fresh process; the order is A B C … C B A, round after round. Two groups, each with losses
that must agree at every step, else the row is void: eight rows to a step, padded by the peers; and the same packed
sequences (packed by distft, handed to TRL as its own padding-free form). TRL runs as it comes and tuned: no activation
checkpointing, fused AdamW. It is left out where it is not installed. The figure is real tokens per second over the
measured steps' median time, as a ratio within the group; peak memory is the process's largest resident set.
"""

from __future__ import annotations

import argparse
import importlib.util
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

WARM_UP = 4
TOLERANCE = 1e-3
"""Relative difference of a step's loss: rounding that training amplifies stays below, other arithmetic does not."""
BATCH, LENGTH, RATE = 8, 512, 3e-4
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GROUPS = {
    "rows": ["distft", "hf", "trl-default", "trl-tuned"],
    "packed": ["distft-packed", "trl-packed"],
}
RECIPE = """
name = "ours"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
dtype = "float32"
[data]
max_length = {length}
packing = {packing}
shuffle = false
loss_on = "completion"
long_rows = "truncate"
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/rows.jsonl"
format = "prompt_completion"
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
    options.add_argument("--rows", help='JSON lines with "question" and "answer"; default: made up, of such lengths')
    options.add_argument("--out")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.worker:
        work(asked.worker[0], Path(asked.worker[1]), asked.steps)
        return
    there = importlib.util.find_spec("trl") is not None
    groups = {name: [one for one in ones if there or "trl" not in one] for name, ones in GROUPS.items()}
    everyone = [one for ones in groups.values() for one in ones]
    found: dict[str, list[dict[str, Any]]] = {one: [] for one in everyone}
    with tempfile.TemporaryDirectory() as text:
        prepare(Path(text), asked)
        for round_ in range(asked.rounds):
            for one in everyone if round_ % 2 == 0 else reversed(everyone):
                found[one].append(launched(one, text, asked.steps))
                print(f"round {round_ + 1}: {one}", file=sys.stderr)
    table = {name: [row(one, found, ones[0]) for one in ones] for name, ones in groups.items()}
    parameters = found["distft"][0]["parameters"]
    kit.finish({"benchmark": "peers", "parameters": parameters, "steps": asked.steps, "groups": table}, asked.out)


def row(name: str, found: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """A contestant's figures, rounds together, against the group's first."""

    def rate(of: str) -> float:
        steps = [s for run in found[of] for s in run["step_s"][WARM_UP:]]
        return found[of][0]["tokens"] / len(found[of][0]["step_s"]) / kit.quantiles(steps)["median"]

    difference = max(
        abs(a - b) / abs(b) for a, b in zip(found[name][0]["losses"], found[reference][0]["losses"], strict=True)
    )
    return {
        "name": name,
        "tokens_per_s_ratio": rate(name) / rate(reference),
        "step_s": kit.quantiles([s for run in found[name] for s in run["step_s"][WARM_UP:]]),
        "tokens": found[name][0]["tokens"],
        "peak_rss_mib": max(run["peak_rss_mib"] for run in found[name]),
        "largest_loss_difference": difference,
        "void": difference > TOLERANCE,
    }


def prepare(folder: Path, asked: argparse.Namespace) -> None:
    """One model's weights and one file of rows for everybody; distft's packed sequences."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distft.demo.files import locate_path

    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=LENGTH)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((Path(locate_path("demo:tiny-llama")) / name).read_bytes())
    rows = []
    if asked.rows:
        for line in Path(asked.rows).read_text(encoding="utf-8").splitlines():
            read = json.loads(line)
            rows.append({"prompt": read["question"], "completion": read["answer"]})
    else:
        rng = random.Random(5)
        for _ in range(2000):  # lengths as people's are: many short, few long
            words = [rng.choice(kit.WORDS) for _ in range(min(170, int(rng.lognormvariate(3.6, 0.7)) + 6))]
            cut = len(words) // 3
            rows.append({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])})
    wanted = asked.steps * BATCH * 16
    text = "".join(json.dumps(one) + "\n" for one in rows[:wanted])
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def launched(name: str, folder: str, steps: int) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", name, folder, "--steps", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, folder: Path, steps: int) -> None:
    """One contestant, in this process."""
    figures = (
        ours(folder, steps, packed=name.endswith("packed"))
        if name.startswith("distft")
        else theirs(name, folder, steps)
    )
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def recipe(folder: Path, steps: int, *, packed: bool) -> Path:
    path = folder / f"recipe-{packed}.toml"
    values = {"folder": folder, "length": LENGTH, "packing": str(packed).lower(), "rate": RATE, "steps": steps}
    path.write_text(RECIPE.format(**values, batch=BATCH).replace('"ours"', f'"ours-{os.getpid()}"'), encoding="utf-8")
    return path


def ours(folder: Path, steps: int, *, packed: bool) -> dict[str, Any]:
    run = kit.Run(recipe_file=recipe(folder, steps, packed=packed))
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        run.go(1)
        seconds.append(time.perf_counter() - begin)
    run.close()
    parameters = sum(param.numel() for param in run.engine.model.parameters())
    return {"step_s": seconds, "losses": run.losses(), "tokens": run.state.tokens, "parameters": parameters}


def examples(folder: Path, steps: int, *, packed: bool) -> list[dict[str, list[int]]]:
    """The rows as distft renders (and packs) them, in the order it trains on them."""
    from distft import assemble
    from distft.catalog import REGISTRIES
    from distft.core.types import IGNORE
    from distft.recipe import load_recipe

    table = load_recipe(
        str(recipe(folder, steps, packed=packed)), registries=REGISTRIES, overrides=["train.micro_batch_size=1"]
    )
    rows = assemble.load_data(table, assemble.choose_layout(table, 1), 0, 1, lambda line: None)
    made = []
    for micros in rows.steps.from_step(0):
        for micro in micros:
            ids, labels = micro.input_ids_T.tolist(), micro.labels_T.tolist()
            # distft's labels are shifted already; a document's first token is never one.
            before = [IGNORE, *labels[:-1]]
            lengths = micro.cu_seqlens.diff().tolist()
            made.append({"input_ids": ids, "labels": before, "seq_lengths": lengths})
    return made


def theirs(name: str, folder: Path, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.since = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.since:
                self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

    clock = Clock()
    made = examples(folder, steps, packed=name == "trl-packed")
    tokens = sum(len(one["input_ids"]) for one in made)
    common: dict[str, Any] = {
        "output_dir": str(folder / "theirs"),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused" if "tuned" in name or "packed" in name else "adamw_torch",
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if name == "hf":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        data = [{key: one[key] for key in ("input_ids", "labels")} for one in made]
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer: Any = Trainer(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(data),
            data_collator=collator,
            callbacks=[clock],
        )
    else:
        from trl import SFTConfig, SFTTrainer

        if name != "trl-packed":
            made = [{key: one[key] for key in ("input_ids", "labels")} for one in made]
        if name != "trl-default":
            common["gradient_checkpointing"] = False
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common,
                max_length=None,
                shuffle_dataset=False,
                padding_free=name == "trl-packed",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list(made),
            processing_class=tokenizer,
            callbacks=[clock],
        )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_s": clock.seconds, "losses": losses, "tokens": tokens}


if __name__ == "__main__":
    main()
