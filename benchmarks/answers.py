"""Answers per second: `distft.evaluation` against transformers' own batched `generate`, on the same rows, greedy.

usage: python benchmarks/answers.py MODEL_FOLDER ROWS.jsonl COLUMN [--rows N] [--new-tokens N] [--rounds N]

Interleaved rounds in one process. `generate` gets as many rows at a time as we take, once in the file's order and once
sorted by length, as whoever cares for speed would do. Both must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distft.core.phase import PHASE
from distft.core.types import UpdateRule
from distft.data.render import load_renderer
from distft.data.samples import PromptCompletion
from distft.engine import processes
from distft.engine.params import EngineParams
from distft.engine.solo import open_engine
from distft.generation.batching import MAX_ROWS
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.generator import Generator
from distft.model import load
from distft.model.adapters import METHODS
from distft.recipe import ModelTable


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("column")
    parser.add_argument("--rows", dest="count", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    renderer = load_renderer(given.model)
    with Path(given.rows).open(encoding="utf-8") as lines:
        texts = [json.loads(line)[given.column] for line in islice(lines, given.count)]
    asked = [renderer.ask(PromptCompletion(prompt=text, completion=""))[1] for text in texts]
    placed = processes.join()
    generator = _generator(given.model, dtype, placed, renderer)
    asked = [list(generator.truncate_prompt(ids, given.new_tokens)) for ids in asked]
    plain = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, dtype)).to(placed.device).eval()
    eos = renderer.tokenizer.eos_token_id
    PHASE.training()

    def ours() -> list[str]:
        prompts = [Prompt(seed_key=str(index), ids=ids) for index, ids in enumerate(asked)]
        return [
            said.text for said in generator.generate(prompts, SamplingParams(max_new_tokens=given.new_tokens)) or ()
        ]

    def theirs(order: list[int]) -> list[str]:
        written = [""] * len(asked)
        for first in range(0, len(order), MAX_ROWS):
            part = order[first : first + MAX_ROWS]
            longest = max(len(asked[index]) for index in part)
            ids = torch.tensor([[0] * (longest - len(asked[i])) + asked[i] for i in part], device=placed.device)
            mask = torch.tensor([[0] * (longest - len(asked[i])) + [1] * len(asked[i]) for i in part]).to(ids.device)
            with torch.inference_mode():
                out = plain.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=given.new_tokens, do_sample=False,
                    eos_token_id=eos, pad_token_id=eos,
                )  # fmt: skip
            for index, new in zip(part, out[:, longest:].tolist(), strict=True):
                written[index] = renderer.write(new[: new.index(eos)] if eos in new else new)
        return written

    in_order = list(range(len(asked)))
    by_length = sorted(in_order, key=lambda index: -len(asked[index]))
    ways: dict[str, Any] = {"ours": ours, "generate": lambda: theirs(in_order), "sorted": lambda: theirs(by_length)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[str]] = {}
    for _ in range(given.rounds + 1):
        for name, act in ways.items():
            began = time.perf_counter()
            said[name] = act()
            seconds[name].append(time.perf_counter() - began)
    best = {name: min(times[1:]) for name, times in seconds.items()}  # the first round warms up
    same = sum(a == b for a, b in zip(said["ours"], said["generate"], strict=True))
    print(f"{len(asked)} rows, {given.new_tokens} new tokens at most, {placed.device}, {dtype}")
    for name, times in seconds.items():
        shown = ", ".join(f"{one:.2f}" for one in times[1:])
        print(f"{name:<10} best {best[name]:.2f} s  ({shown})  {best[name] / best['ours']:.2f} x ours")
    print(f"{same} of {len(asked)} answers are equal to generate's")


def _generator(folder: str, dtype: str, placed: processes.Processes, renderer: Any) -> Generator:
    table, spec = ModelTable(path=folder, dtype=dtype), METHODS["full"]  # type: ignore[arg-type]
    built = load.build(table, Path(folder), spec, spec.params(), seed=0, device=placed.device)
    for param in list(built.module.parameters())[1:]:
        param.requires_grad_(False)
    engine = open_engine("solo", EngineParams(), placed)
    rule = UpdateRule(
        build=lambda groups: torch.optim.SGD(groups, lr=0.0), lr_at=lambda step: 0.0, weight_decay=0.0,
        decayed=frozenset(), max_grad_norm=None,
    )  # fmt: skip
    engine.setup(built, rule, micros_per_step=1)
    stop_ids = [renderer.tokenizer.eos_token_id]
    return Generator(engine, built.module, decode=renderer.write, stop_ids=stop_ids, stop=lambda: False)


if __name__ == "__main__":
    main()
