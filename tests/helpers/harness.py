"""Starts real multi-process runs and reads what they left behind."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from distft.demo.files import locate_path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
BATCH = 8
LENGTH = 96


@dataclass(frozen=True)
class Bench:
    """A tiny pretrained model and rows of very different lengths, in a folder of their own."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @classmethod
    def make(cls, folder: Path) -> "Bench":
        """A Llama with grouped-query attention and untied head, random weights; 64 rows of 6 to ~90 tokens."""
        model = folder / "model"
        tokens = Path(locate_path("demo:tiny-llama"))
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.05, bos_token_id=None,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((tokens / name).read_bytes())
        rng = random.Random(3)
        words = ("disk", "queue", "login", "payments", "region", "timeout", "cache", "slow", "deploy", "users", "retry")

        def some(least: int, most: int) -> str:
            return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))

        for split, count in (("train", 64), ("valid", 9)):
            rows = [{"prompt": some(1, 22) + ":", "completion": " " + some(1, 30)} for _ in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        bench = cls(folder)
        bench.recipe.write_text(
            f"""
name = "bench"
output_dir = "{folder}/runs"
[model]
path = "{model}"
dtype = "float32"
[data]
max_length = {LENGTH}
loss_on = "completion"
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/train.jsonl"
[[data.eval]]
path = "{folder}/valid.jsonl"
[optim]
learning_rate = 1e-2
weight_decay = 0.1
[schedule]
name = "cosine"
warmup_steps = 2
[train]
max_steps = {STEPS}
global_batch_size = {BATCH}
max_grad_norm = 0.5
[log]
tensorboard = false
console = "off"
"""
        )
        return bench

    def poisoned(self, row: int) -> list[str]:
        """Overrides under which one row of the training file, and no other, has a loss that is not finite."""
        model, rows = self.folder / "poisoned", self.folder / "poisoned.jsonl"
        lm = AutoModelForCausalLM.from_pretrained(self.folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        lines = (self.folder / "train.jsonl").read_text().splitlines()
        mark = tokenizer("§")["input_ids"]
        used = {i for line in lines for i in tokenizer(line)["input_ids"]}
        alone = next(i for i in mark if i not in used)
        lm.get_input_embeddings().weight.data[alone] = float("nan")
        lm.save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((self.folder / "model" / name).read_bytes())
        guilty = json.loads(lines[row - 1])
        lines[row - 1] = json.dumps(guilty | {"prompt": "§ " + guilty["prompt"]})
        rows.write_text("\n".join(lines) + "\n")
        return [f'model.path="{model}"', f'data.train.0.path="{rows}"']

    def launch(
        self,
        world: int,
        cases: dict[str, list[str]],
        *,
        tag: str,
        extra: dict[str, dict[str, str]] | None = None,
        timeout_s: float = 600.0,
    ) -> dict[str, "Run"]:
        """Every case (name -> overrides) in one launch of `world` processes; `extra`: see worker.py.

        Raises:
            AssertionError: the launch itself failed; carries its output.
        """
        plan, results = self.folder / f"{tag}.plan.json", self.folder / f"{tag}.results.json"
        listed = [
            {"name": name, "recipe": str(self.recipe), "overrides": [f'name="{tag}-{name}"', *overrides]}
            | (extra or {}).get(name, {})
            for name, overrides in cases.items()
        ]
        plan.write_text(json.dumps({"cases": listed, "results": str(results)}))
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
        command = [*torchrun, "--nproc-per-node", str(world), str(ROOT / "tests/dist/worker.py"), str(plan)]
        done = run(command, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        return {name: Run.read(said, done.stderr) for name, said in json.loads(results.read_text()).items()}


@dataclass(frozen=True)
class Run:
    """What one run left behind."""

    folder: Path | None
    error: str
    steps: list[dict]
    evals: list[dict]

    @classmethod
    def read(cls, said: dict, output: str = "") -> "Run":
        if "error" in said:
            return cls(None, said["error"] + "\n" + said.get("trace", ""), [], [])
        folder = Path(said["folder"])
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "loss" in record]
        return cls(folder, "", steps, [record for record in records if "eval_loss" in record])

    def column(self, name: str) -> list[float]:
        assert not self.error, self.error
        return [record[name] for record in self.steps]


def run(command: list[str], *, timeout_s: float = 600.0, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in the project's root, one thread per process, its output captured."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "MASTER_"))}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | env
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two equally long columns."""
    assert len(a) == len(b) == STEPS, (len(a), len(b))
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
