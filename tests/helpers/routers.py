"""Three adapters of random numbers beside a tiny base, and a router that tells their requests apart by words."""

import json
import random
from pathlib import Path

import export_kit as kit

from distft.router import main

ASKS = {"red": ("the red ball", "a big red tree"), "dog": ("the little dog", "a dog and a cat"), "rain": ("it rained",)}
WORDS = [word for word in kit.TEXT.split(" ") if word.isalpha() and word not in ("red", "dog", "rained", "cat", "tree")]


def requests(name: str, count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(f"{name} {seed}")
    rows = []
    for _ in range(count):
        around = [draw.choice(WORDS) for _ in range(4)]
        around.insert(draw.randrange(5), draw.choice(ASKS[name]))
        rows.append({"prompt": " ".join(around), "completion": draw.choice(WORDS)})
    return rows


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_router(folder: Path, table: str = "") -> Path:
    """The folder, with the router in `router`; `table`: keys of [router]."""
    base = kit.save_model(folder / "base")
    text = f'name = "router"\noutput_dir = "{folder}"\n' + (f"[router]\n{table}\n" if table else "")
    for number, name in enumerate(ASKS):
        kit.save_adapter(folder / name, base, seed=number)
        write(folder / f"{name}.jsonl", requests(name, 150, 0))
        write(folder / f"{name}-held.jsonl", requests(name, 30, 1))
        text += f'[[adapters]]\nname = "{name}"\npath = "{folder / name}"\nrows = "{folder / name}.jsonl"\n'
        text += f'eval_rows = "{folder / name}-held.jsonl"\n'
    (folder / "router.toml").write_text(text)
    assert main(["train", str(folder / "router.toml"), "--min-accuracy", "0.95"]) == 0
    return folder
