"""What the framework costs: our step against a bare PyTorch loop that does the same arithmetic, in one process.

    python benchmarks/overhead.py [--pairs 8] [--steps 20] [--only tiny] [--out FILE.json]

Ours is the real loop (`distft.loop.fit`) with everything a run has around it: rows, prefetching, metrics.jsonl, guard,
checkpoints, watch points. The bare loop is what one would write by hand: the same transformers model, batches that are
already tensors, summed cross-entropy over all logits, clip_grad_norm_, fused AdamW, one `.item()` a step. Blocks of
steps alternate A B B A, so that a noisy machine hurts both; the figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kit
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from distft.core.types import IGNORE, Batch

LOSS_TOLERANCE = 1e-3
"""Relative, over all steps: rounding that training amplifies stays below, other arithmetic does not."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the shape of a step."""

    config: dict[str, int]
    max_length: int
    batch: int
    micro: int
    packing: bool = True


TWENTY_MILLION = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
SIZES = {
    # 260 thousand parameters: a step is so short that every needless line of Python shows.
    "tiny": Size(
        config={
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        max_length=256,
        batch=8,
        micro=4,
    ),
    "20m": Size(
        config=TWENTY_MILLION,
        max_length=512,
        batch=2,
        micro=1,
    ),
    # One document to a micro-batch: the bare loop needs nothing of ours, not even the attention between documents.
    "20m-unpacked": Size(
        config=TWENTY_MILLION,
        max_length=512,
        batch=2,
        micro=1,
        packing=False,
    ),
}

RECIPE = """
name = "ours"
output_dir = "{folder}/runs"
[model]
path = "{folder}/model"
tokenizer = "demo:tiny-llama"
init = "random"
dtype = "float32"
[data]
max_length = {length}
packing = {packing}
cache_dir = "{folder}/cache"
[[data.train]]
path = "{folder}/rows.jsonl"
format = "text"
[optim]
learning_rate = 1e-4
weight_decay = 0.1
[schedule]
name = "constant"
[train]
max_steps = {steps}
global_batch_size = {batch}
micro_batch_size = {micro}
[engine]
name = "solo"
[log]
tensorboard = false
console = "off"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=10, help="pairs of blocks, one of each loop")
    options.add_argument("--steps", type=int, default=20, help="optimizer steps in a block")
    options.add_argument("--only", choices=SIZES)
    options.add_argument("--out")
    asked = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cases = [measure(name, size, asked) for name, size in SIZES.items() if asked.only in (None, name)]
    kit.finish({"benchmark": "overhead", "pairs": asked.pairs, "steps": asked.steps, "cases": cases}, asked.out)


def measure(name: str, size: Size, asked: argparse.Namespace) -> dict[str, Any]:
    """Blocks of both loops in turn, from the same weights over the same batches; the first of each warms up."""
    blocks = asked.pairs + 1
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        run = kit.Run(recipe_file=prepare(folder, size, blocks * asked.steps))
        bare = Bare(run.engine.model.lm, documents_apart=size.packing)
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        batches = run.rows.steps.from_step(0)
        for block in range(blocks):
            steps = list(itertools.islice(batches, asked.steps))
            loops = {"ours": lambda: run.go(asked.steps), "bare": lambda steps=steps: bare.go(steps)}
            for which in ("ours", "bare") if block % 2 == 0 else ("bare", "ours"):
                begin = time.perf_counter()
                loops[which]()
                seconds[which].append((time.perf_counter() - begin) / asked.steps)
        run.close()
        difference = max(abs(a - b) / abs(b) for a, b in zip(run.losses(), bare.losses, strict=True))
    pairs = list(zip(seconds["ours"], seconds["bare"], strict=True))[1:]
    return {
        "case": name,
        "parameters": sum(param.numel() for param in bare.lm.parameters()),
        "tokens_per_step": run.state.tokens / run.state.step,
        "ratio": kit.quantiles([ours / theirs for ours, theirs in pairs]),
        "bare_step_s": kit.quantiles([theirs for _, theirs in pairs]),
        "largest_loss_difference": difference,
        "void": difference > LOSS_TOLERANCE,
    }


def prepare(folder: Path, size: Size, steps: int) -> Path:
    """Model, rows and recipe."""
    kit.write_config(folder / "model", size.config)
    kit.write_rows(
        folder / "rows.jsonl", 600, (8, size.max_length // 3) if size.packing else (60, size.max_length // 2)
    )
    recipe = folder / "recipe.toml"
    values = {"folder": folder, "length": size.max_length, "packing": str(size.packing).lower(), "steps": steps}
    recipe.write_text(RECIPE.format(**values, batch=size.batch, micro=size.micro), encoding="utf-8")
    return recipe


class Bare:
    """What one writes by hand."""

    def __init__(self, ours: Any, *, documents_apart: bool) -> None:
        """A model of its own with the same values; `documents_apart`: attention must tell packed documents apart."""
        self.lm = lm = AutoModelForCausalLM.from_config(ours.config).train()
        lm.load_state_dict(ours.state_dict())
        self.losses: list[float] = []
        self._apart = documents_apart
        if not documents_apart:
            lm.config._attn_implementation = "sdpa"
        decayed = [param for param in lm.parameters() if param.ndim >= 2]
        plain = [param for param in lm.parameters() if param.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def go(self, steps: list[list[Batch]]) -> None:
        """Forward, backward, clip, update."""
        for micros in steps:
            weight = sum(int((micro.labels_T != IGNORE).sum()) for micro in micros)
            total = torch.zeros(())
            for micro in micros:
                inputs = {"input_ids": micro.input_ids_T[None], "use_cache": False}
                if self._apart:
                    bounds, longest = micro.cu_seqlens, micro.max_seqlen
                    inputs |= {"position_ids": micro.position_ids_T[None]}
                    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
                    inputs |= {"max_length_q": longest, "max_length_k": longest}
                logits = self.lm(**inputs).logits[0].float()
                loss = F.cross_entropy(logits, micro.labels_T, ignore_index=IGNORE, reduction="sum") / weight
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.losses.append(total.item())


if __name__ == "__main__":
    main()
