"""Time to the first step, against importing the libraries that the run needs; and how fast mistakes are told.

    python benchmarks/startup.py [--rounds 5] [--engines solo zero3] [--out FILE.json]

Whole processes, in turns. The libraries are those that the run was found to have imported: a bare process imports the
same modules and ends. A run is timed from its start to the line of its first step in metrics.jsonl; one process, rows
already prepared, as when a job is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kit

SHORT = ["train.epochs=", "train.max_steps=1", "eval.at_start=false", "eval.at_end=false", "log.tensorboard=false"]
LISTED = """
import json, sys
from pathlib import Path
sys.argv = json.loads(sys.argv[1])
from distft.core.hard_exit import hard_exit
from distft.job import main
code = main(sys.argv[1:])
def kept(name, module):
    root = name.split(".")[0]
    ours = root in sys.stdlib_module_names or name.startswith(("distft", "_"))
    return not ours and getattr(module, "__file__", None)
Path("modules.json").write_text(json.dumps([name for name, module in list(sys.modules.items()) if kept(name, module)]))
hard_exit(code)
"""
BARE = """
import importlib, json, sys
for name in json.load(open("modules.json")):
    try:
        importlib.import_module(name)
    except Exception:
        pass  # modules that others make, not files
import os
os._exit(0)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--engines", nargs="+", default=["solo", "zero3"])
    options.add_argument("--out")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        runs = [first_step(folder, engine, asked.rounds) for engine in asked.engines]
        told = mistakes(folder, asked.rounds)
    kit.finish({"benchmark": "startup", "rounds": asked.rounds, "first_step": runs, "told": told}, asked.out)


def first_step(folder: Path, engine: str, rounds: int) -> dict[str, Any]:
    recipe = str(kit.ROOT / "recipes" / "tiny-full.toml")
    arguments = ["distft.train", recipe, "--output-dir", str(folder)]
    for override in [*SHORT, f'engine.name="{engine}"', f'data.cache_dir="{folder}/cache"']:
        arguments += ["--set", override]
    process(folder, ["-c", LISTED, json.dumps([*arguments, "--set", f'name="listed-{engine}"'])])
    seconds: dict[str, list[float]] = {"run": [], "imports": []}
    for round_ in range(rounds):
        for which in ("run", "imports") if round_ % 2 == 0 else ("imports", "run"):
            if which == "imports":
                seconds[which].append(process(folder, ["-c", BARE]))
                continue
            name = f"{engine}-{round_}"
            metrics = folder / name / "metrics.jsonl"
            command = ["-m", *arguments, "--set", f'name="{name}"']
            seconds[which].append(process(folder, command, until=metrics))
    ratios = [run / bare for run, bare in zip(seconds["run"], seconds["imports"], strict=True)]
    return {"engine": engine, "ratio": kit.quantiles(ratios)} | {f"{k}_s": kit.quantiles(v) for k, v in seconds.items()}


def process(folder: Path, arguments: list[str], until: Path | None = None) -> float:
    """Seconds of a process to its end, or until a file has a line."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(kit.ROOT)}
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=folder, env=env, stderr=subprocess.DEVNULL) as started:
        while until is not None and started.poll() is None and not (until.exists() and until.stat().st_size):
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        code = started.wait()
    if code:
        raise SystemExit(f"{arguments[:3]} ended with {code}")
    return time.perf_counter() - begin if until is None else seconds


def mistakes(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds until help, a refused recipe, and a check of good rows that are prepared already."""
    good = kit.ROOT / "recipes" / "tiny-full.toml"
    bad = folder / "bad.toml"
    bad.write_text(good.read_text(encoding="utf-8").replace("[optim]", "[optmi]"), encoding="utf-8")
    cases = {
        "help": ["-m", "distft.cli", "--help"],
        "recipe_error": ["-m", "distft.train", str(bad)],
        "check": ["-m", "distft.cli", "check", str(good), "--set", f'data.cache_dir="{folder}/cache"'],
    }
    found = {}
    for name, arguments in cases.items():
        seconds = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=kit.ROOT
            )
            seconds.append(time.perf_counter() - begin)
            if done.returncode != (2 if name == "recipe_error" else 0):
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
        found[f"{name}_s"] = kit.quantiles(seconds[1:])
    return found


if __name__ == "__main__":
    main()
