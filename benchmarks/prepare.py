"""How much of the raw tokenizer's speed preparing rows keeps, per core: reading, rendering, masking, writing included.

    python benchmarks/prepare.py [--rows 4000] [--tokenizer FOLDER] [--out FILE.json]

One process, one thread, in CPU seconds, which other work on the machine does not stretch; what one row costs (loading
the tokenizer, writing files) is told apart. The raw figure is the tokenizer's own `encode_batch` over what must be
tokenised, already in memory: the rows' texts, and of prompt and completion the prompts once more, because where the
completion starts is where the two part. Chats are also compared with transformers' `apply_chat_template`, which
renders and tokenises too. Packing, which happens at the start of every run, is timed over the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import kit

import distft

ROUNDS = 5
RECIPE = """
name = "prepare"
output_dir = "{folder}/runs"
[model]
path = "{tokenizer}"
[data]
max_length = 2048
num_workers = 0
cache_dir = "{folder}/cache"
chat_template = "plain"
[[data.train]]
path = "{folder}/{shape}.jsonl"
format = "{shape}"
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--tokenizer", default="demo:tiny-llama", help="a folder with tokenizer.json")
    options.add_argument("--out")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write(folder, asked.rows)
        cases = [measure(folder, shape, asked) for shape in ("text", "prompt_completion", "messages")]
    kit.finish({"benchmark": "prepare", "rows": asked.rows, "tokenizer": asked.tokenizer, "cases": cases}, asked.out)


def write(folder: Path, count: int) -> None:
    """The same words as plain text, as prompt and completion, and as a chat."""
    rng = random.Random(1)
    words = [*kit.WORDS, "the", "was", "after", "we", "restarted", "and", "again,", "because", "it", "failed."]
    with (
        (folder / "text.jsonl").open("w") as text,
        (folder / "prompt_completion.jsonl").open("w") as pairs,
        (folder / "messages.jsonl").open("w") as chats,
    ):
        for _ in range(count):
            said = [
                " ".join(rng.choice(words) for _ in range(min(400, int(rng.lognormvariate(4, 0.8)) + 4))) for _ in "ab"
            ]
            text.write(json.dumps({"text": " ".join(said)}) + "\n")
            pairs.write(json.dumps({"prompt": said[0], "completion": " " + said[1]}) + "\n")
            turns = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
            chats.write(json.dumps({"messages": turns}) + "\n")


def measure(folder: Path, shape: str, asked: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from distft.catalog import REGISTRIES
    from distft.data.order import train_order
    from distft.data.prepare import prepare
    from distft.recipe import load_recipe

    path = folder / f"{shape}.toml"
    path.write_text(RECIPE.format(folder=folder, shape=shape, tokenizer=asked.tokenizer), encoding="utf-8")
    recipe = load_recipe(str(path), registries=REGISTRIES)
    made = iter(range(1000))

    def ours(recipe: Any) -> Any:
        cache = folder / f"cache-{shape}-{next(made)}"
        return prepare(
            recipe.data, recipe.data.train, split="train", tokenizer=recipe.model.path, revision=None, cache_dir=cache
        )

    prepared = ours(recipe)  # imports and first touches are not its speed
    single = one_row(folder, shape, recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    texts = [tokenizer.decode(prepared.row(at)[0]) for at in range(prepared.num_rows)]
    rows = [json.loads(line) for line in (folder / f"{shape}.jsonl").read_text(encoding="utf-8").splitlines()]
    if shape == "prompt_completion":
        texts += [row["prompt"] for row in rows]
    backend = tokenizer.backend_tokenizer

    def raw() -> Any:
        for start in range(0, len(texts), 512):
            backend.encode_batch(texts[start : start + 512], add_special_tokens=False)

    def library() -> Any:
        if shape == "messages":
            for row in rows:
                tokenizer.apply_chat_template(
                    row["messages"], chat_template=template, return_assistant_tokens_mask=False
                )

    template = (Path(distft.__file__).parent / "data/templates/plain.jinja").read_text(encoding="utf-8")
    names = ("ours", "raw", "fixed", "library")
    pieces = in_turns(lambda: ours(recipe), raw, lambda: ours(single), library)
    seconds = dict(zip(names, pieces, strict=True))
    fixed = kit.quantiles(seconds["fixed"])["median"]
    seconds["ours"] = [second - fixed for second in seconds["ours"]]
    lengths, sources = prepared.lengths, prepared.source_rows()
    [pack] = in_turns(lambda: train_order(lengths, sources, recipe.data, seed=1).sequence(0))
    tokens = int(lengths.sum())
    return {
        "case": shape,
        "rows": prepared.num_rows,
        "tokens": tokens,
        "fixed_s": fixed,
        "share_of_raw": kit.quantiles([r / o for o, r in zip(seconds["ours"], seconds["raw"], strict=True)]),
        "times_faster_than_apply_chat_template": kit.quantiles(
            [theirs / own for own, theirs in zip(seconds["ours"], seconds["library"], strict=True)]
        )
        if shape == "messages"
        else None,
        "rows_per_s_per_core": prepared.num_rows / kit.quantiles(seconds["ours"])["median"],
        "packed_rows_per_s": prepared.num_rows / kit.quantiles(pack)["median"],
    }


def one_row(folder: Path, shape: str, recipe: Any) -> Any:
    """The recipe over its first row alone: what loading the tokenizer and writing files costs."""
    path = folder / f"one-{shape}.jsonl"
    path.write_text((folder / f"{shape}.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    source = recipe.data.train[0].model_copy(update={"path": str(path)})
    return replace(recipe, data=recipe.data.model_copy(update={"train": (source,)}))


def in_turns(*pieces: Callable[[], Any]) -> list[list[float]]:
    """CPU seconds of each piece, A B B A."""
    found: list[list[float]] = [[] for _ in pieces]
    for round_ in range(ROUNDS):
        order: Iterator[int] = iter(range(len(pieces)) if round_ % 2 == 0 else reversed(range(len(pieces))))
        for which in order:
            begin = time.process_time()
            pieces[which]()
            found[which].append(time.process_time() - begin)
    return found


if __name__ == "__main__":
    main()
