"""Memory and throughput of full fine-tuning, LoRA and QLoRA, measured beside the plan of each: `distft bench`, kept.

    python benchmarks/methods.py [RECIPE] [--name NAME] [options of distft bench]

Without a recipe: recipes/tiny-full.toml, from random weights, on this machine's CPU; three methods, three engines, two
micro-batches, two lengths, full-length mock rows. On GPUs name a recipe; weights are random there too (the config is
enough), so give `--set model.init='"pretrained"'` for rows and losses that mean something. The table, the records and
the pictures go to benchmarks/results/DATE-NAME.md, .json and DATE-NAME/; of a CPU's times the table keeps ratios only.
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
import tempfile
from pathlib import Path

from distft.bench import table
from distft.bench.command import main as bench
from distft.bench.provenance import gpus

ROOT = Path(__file__).resolve().parent
TINY = "recipes/tiny-full.toml"
ON_A_CPU = [
    "--engines", "solo,zero3,fsdp2", "--micro", "1,2", "--lengths", "256,512", "--nproc", "2",
    "--set", "train.global_batch_size=4",
]  # fmt: skip
"""Solo beside two engines that shard; small enough for two cores."""


def main(argv: list[str]) -> int:
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else TINY
    name = f"methods-{'gpu' if gpus() else 'cpu'}"
    if "--name" in argv:
        at = argv.index("--name")
        _, name = argv.pop(at), argv.pop(at)
    asked = ["--methods", "full,lora,qlora", "--rows", "full", "--set", 'model.init="random"']
    folder = Path(tempfile.gettempdir()) / f"distft-{name}"  # a run that is stopped goes on from here
    command = [recipe, *asked, *(ON_A_CPU if recipe == TINY else []), "--output", str(folder), *argv]
    code = bench(command)
    if (folder / "bench.json").is_file():
        keep(folder, f"{datetime.date.today().isoformat()}-{name}", command)
    return code


def keep(folder: Path, name: str, command: list[str]) -> None:
    """Copy what is worth keeping; without the temporary folder's name in it."""
    results = ROOT / "results"
    pictures = results / name
    pictures.mkdir(parents=True, exist_ok=True)
    shown = [*command]
    del shown[shown.index("--output") : shown.index("--output") + 2]
    whole = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    text = table.markdown(whole["name"], whole["records"], times=bool(gpus()))
    quoted = " ".join(f"'{word}'" if '"' in word else word for word in shown)
    text += f"\n```\npython -m distft.bench {quoted}\n```\n"
    for path in sorted(folder.glob("*.svg" if gpus() else "memory-*.svg")):
        shutil.copyfile(path, pictures / path.name)
        text += f"\n![{path.stem}]({name}/{path.name})\n"
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    (results / f"{name}.json").write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"kept: {results / name}.md", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
