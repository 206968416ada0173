"""Rollouts per second: the engine's generator against transformers' `generate`, and what of a step is not the model.

usage: python benchmarks/sampling.py MODEL_FOLDER [--answers 32] [--prompt 16] [--new-tokens 128] [--rounds N]
       python benchmarks/sampling.py MODEL_FOLDER --rows FILE.jsonl [--each 8]
       python benchmarks/sampling.py --step RECIPE [--set ...]

Draws at temperature 1 with the log-probability of each token, in interleaved rounds of one process. Without rows no
token ends an answer, so that both write equally many; with them, the column `prompt` is asked `--each` times a row and
answers end where the model ends them. `--step` runs a recipe and sums
the time in forwards, backwards and updates, the first step left out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.core.phase import PHASE
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.local import local_generator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--step", action="store_true", help="MODEL is a recipe, of which a run is timed")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows")
    parser.add_argument("--each", type=int, default=8)
    given = parser.parse_args()
    print(json.dumps(of_step(given) if given.step else of_answers(given), indent=2))


def of_answers(given: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    load = functools.partial(AutoModelForCausalLM.from_pretrained, given.model, dtype=dtype)
    mine, plain = load().to(device).eval(), load().to(device).eval()
    asked, ends = _asked(given, mine)
    generator = local_generator(mine, _NoTexts(), stop_ids=ends)
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked], device=device)
    prompts = [Prompt(seed_key=str(index), ids=row) for index, row in enumerate(asked)]
    how = SamplingParams(max_new_tokens=given.new_tokens, temperature=1.0, logprobs=True)
    in_model = _Timed(type(generator._module).forward, device)
    type(generator._module).forward = in_model.wrapped()  # type: ignore[method-assign]
    PHASE.training()

    tokens: dict[str, list[int]] = {"ours": [], "generate": []}

    def ours() -> None:
        tokens["ours"].append(sum(one.num_tokens for one in generator.generate(prompts, how) or ()))

    def theirs() -> None:
        with torch.inference_mode():
            out = plain.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=given.new_tokens, eos_token_id=list(ends) or None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        logits_BNV = torch.stack(out.logits, 1)
        out_BN = out.sequences[:, longest:]
        ended_BN = torch.isin(out_BN, torch.tensor(ends, dtype=torch.long, device=device)).cumsum(1) > 0
        tokens["generate"].append(int((~ended_BN).sum() + ended_BN.any(1).sum()))
        logits_BNV.float().log_softmax(-1).gather(2, out_BN[..., None]).tolist()

    ways = {"ours": ours, "generate": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # warm
        way()
    in_model.seconds = 0.0
    for number in range(given.rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = _now(device)
            ways[name]()
            seconds[name].append(_now(device) - began)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["generate"], strict=True)]
    return {
        "model": Path(given.model).name, "answers": given.answers, "new_tokens": given.new_tokens,
        "tokens_written": tokens,
        "parameters": sum(param.numel() for param in mine.parameters()), "seconds": seconds,
        "ratio_median": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
        "answers_per_s": given.answers / statistics.median(seconds["ours"]),
        "share_outside_the_model": 1 - in_model.seconds / sum(seconds["ours"]),
    }  # fmt: skip


def of_step(given: argparse.Namespace) -> dict[str, Any]:
    """Time a run of one process: of its steps, what is no forward, backward or update."""
    from distft import load_recipe, train
    from distft.engine.solo import SoloEngine
    from distft.model.causal import CausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    timed = {
        name: _Timed(getattr(owner, name), device)
        for owner, name in ((CausalLM, "forward"), (SoloEngine, "backward"), (SoloEngine, "step"))
    }
    first: dict[str, float] = {}
    for owner, name in ((CausalLM, "forward"), (SoloEngine, "backward"), (SoloEngine, "step")):
        setattr(owner, name, timed[name].wrapped())
    take_step = SoloEngine.step

    def noted(*args: Any, **kwargs: Any) -> Any:
        """Leave out everything up to the end of the first step: the evaluation before it is none."""
        report = take_step(*args, **kwargs)
        if not first:
            first.update({name: each.seconds for name, each in timed.items()}, until=timed["step"].until)
        return report

    SoloEngine.step = noted  # type: ignore[method-assign]
    result = train(load_recipe(given.model, overrides=['engine.name="solo"', *given.overrides]), resume="never")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line]
    whole = timed["step"].until - first["until"]
    parts = {name: each.seconds - first[name] for name, each in timed.items()}
    return {
        "steps": len(steps) - 1, "step_s": whole / (len(steps) - 1), "in_model_s": parts,
        "writing_s": sum(line["writing_s"] for line in steps), "judging_s": sum(line["judging_s"] for line in steps),
        "share_that_is_not_the_model": 1 - sum(parts.values()) / whole,
    }  # fmt: skip


def _asked(given: argparse.Namespace, lm: Any) -> tuple[list[list[int]], tuple[int, ...]]:
    """Return the prompts' tokens, and what ends an answer."""
    if given.rows is None:
        vocabulary = lm.config.get_text_config(decoder=True).vocab_size
        drawn = torch.Generator().manual_seed(1)
        return torch.randint(3, vocabulary, (given.answers, given.prompt), generator=drawn).tolist(), ()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with Path(given.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line)["prompt"] for line in itertools.islice(lines, given.answers // given.each)]
    ends = lm.generation_config.eos_token_id
    return [tokenizer(row)["input_ids"] for row in rows for _ in range(given.each)], (
        tuple(ends) if isinstance(ends, list) else (ends,)
    )


class _Timed:
    """Adds up the seconds of a method; nested calls count once."""

    def __init__(self, method: Any, device: str) -> None:
        self._method, self._device, self.seconds = method, device, 0.0
        self.until = 0.0
        """When the last call ended."""

    def wrapped(self) -> Any:
        @functools.wraps(self._method)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = _now(self._device)
            try:
                return self._method(*args, **kwargs)
            finally:
                self.until = _now(self._device)
                self.seconds += self.until - began

        return call


def _now(device: str) -> float:
    """Return seconds: of this process on a CPU, which others share; on a GPU of the clock, once it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class _NoTexts:
    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


if __name__ == "__main__":
    main()
