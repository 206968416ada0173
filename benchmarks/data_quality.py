"""How long `distft.data_quality` takes: made-up chats with repeats, overlap and secrets planted, one process.

`python benchmarks/data_quality.py [ROWS]` prints a Markdown row; a wrong count is an error.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from distft.data_quality import examine
from distft.recipe import DataTable


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(count))


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer in rows:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}) + "\n")


def main(count: int) -> None:
    draw = random.Random(0)
    known = [words(draw, 1) for _ in range(20_000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(known, k=length))

    rows = [(text(60), text(110)) for _ in range(count)]
    for at in range(0, count // 100):  # one row in a hundred repeats an earlier one, every other with a word changed
        prompt, answer = rows[at]
        rows[count - 1 - at] = (prompt, answer if at % 2 else f"well {answer}")
    held_out = [(text(60), text(110)) for _ in range(1000)]
    held_out[:20] = rows[100:120]
    rows[7] = (rows[7][0], f"{rows[7][1]} AKIA{'Q7' * 8}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {split: Path(folder) / f"{split}.jsonl" for split in ("train", "eval")}
        write(paths["train"], rows)
        write(paths["eval"], held_out)
        table = DataTable.model_validate_json(
            json.dumps({split: [{"path": str(path), "format": "messages"}] for split, path in paths.items()})
        )
        size = paths["train"].stat().st_size / 1e6
        begin = time.perf_counter()
        report = examine(table, cache_dir=Path(folder) / "cache")
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        examine(table, cache_dir=Path(folder) / "cache")
        again = time.perf_counter() - begin
    assert report.num_same + report.num_near >= count // 100 - 1, (report.num_same, report.num_near)
    assert report.num_overlap == 20, report.num_shared
    assert report.num_found == {"AWS access key": 1}, report.num_found
    print(f"| {count:,} | {size:.0f} MB | {first:.1f} s | {count / first:,.0f} | {again:.2f} s |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
