"""Starts real multi-process runs and reads what they left behind."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from distft.demo.files import locate_path
from distft.health.heartbeat import Heartbeat, HeartbeatFile

ROOT = Path(__file__).resolve().parents[2]
WHOLE_GRIDS = os.environ.get("DISTFT_WHOLE_GRIDS") == "1"
"""Every cell of every grid: `make test-all` and the grids' own targets. Else each has a covering part."""
STEPS = 6
BATCH = 8
LENGTH = 96
Layout = tuple[str, int] | tuple[str, int, str]
"""(engine, processes), and a name of SETTINGS."""
SETTINGS = {"halves": "engine.shard_within=2", "once": 'engine.gather="once_a_step"'}


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
        # A base must be finite: this word's vector is zero, which norms without an epsilon divide by.
        lm.get_input_embeddings().weight.data[alone] = 0.0
        lm.config.rms_norm_eps = 0.0
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
        worker: str = "worker.py",
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
        printed = run_ranks(world, [str(ROOT / "tests/dist" / worker), str(plan)], timeout_s=timeout_s)
        return {name: Run.read(said, printed) for name, said in json.loads(results.read_text()).items()}


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


@dataclass(frozen=True)
class End:
    """What two runs must agree on to have been the same: the order of samples shows in losses and tokens."""

    losses: tuple[float, ...]
    """Of every step; a step that was made twice is there twice."""
    tokens: tuple[float, ...]
    """Consumed up to every step."""
    tensors: str
    """sha256 of the final weights."""


@dataclass(frozen=True)
class Job:
    """A run on two processes, started again and again by one command line: under torchrun, or see `forks`."""

    bench: Bench
    name: str
    engine: str = "zero3"
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.bench.folder / "runs" / self.name

    @property
    def arguments(self) -> list[str]:
        """Of `python -m distft.train`."""
        settings = [f'name="{self.name}"', f'engine.name="{self.engine}"', "train.micro_batch_size=1"]
        out = [str(self.bench.recipe)]
        for setting in [*settings, "checkpoint.every_steps=2", *self.settings]:
            out += ["--set", setting]
        return out

    def start(self, *, fault: str = "", ignoring_usr1: bool = False) -> "Launch":
        """`ignoring_usr1`: as a batch script starts torchrun, whose agent would die of it."""
        trap = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash"] if ignoring_usr1 else []
        return Launch([*trap, *torchrun(2), "-m", "distft.train", *self.arguments], DISTFT_FAULT=fault)

    def run(self, *, fault: str = "", timeout_s: float = 240.0) -> "Ended":
        """Start it and wait for its end, which no process of it may outlive."""
        with self.start(fault=fault) as launch:
            return launch.end(timeout_s)

    def exit(self) -> dict:
        return json.loads((self.folder / "exit.json").read_text())

    def records(self) -> dict[int, Heartbeat]:
        """What each rank last said of itself."""
        return HeartbeatFile(self.folder / "ranks", 0).read(range(2))

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[-8:]) for path in (self.folder / "checkpoints").glob("step-" + 8 * "[0-9]"))

    def result(self) -> End:
        said = Run.read({"folder": str(self.folder)})
        tensors = hashlib.sha256((self.folder / "final/model.safetensors").read_bytes()).hexdigest()
        return End(tuple(said.column("loss")), tuple(said.column("tokens")), tensors)


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    code: int
    stderr: str


class Launch:
    """Processes that are running; whatever is left of them is killed at the end of the `with`."""

    MARK = "DISTFT_TEST_LAUNCH"

    def __init__(self, command: Sequence[str], **env: str) -> None:
        self._mark = uuid.uuid4().hex
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the launch
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**env, **{self.MARK: self._mark}), stdout=self._said, stderr=self._said
        )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for pid in self.alive():
            self.kill(pid)
        self.process.wait()
        self._said.close()

    def alive(self) -> list[int]:
        """Every living process of this launch, however it is related to the first."""
        mark = f"{self.MARK}={self._mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def kill(self, pid: int) -> None:
        """At once, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end(self, timeout_s: float = 240.0) -> Ended:
        """Wait until all processes are gone."""
        until(lambda: self.process.poll() is not None, timeout_s, self.stderr)
        until(lambda: not self.alive(), 30, self.stderr)
        return Ended(self.process.returncode, self.stderr())

    def stderr(self) -> str:
        """What all processes have printed so far."""
        return Path(f"/proc/self/fd/{self._said.fileno()}").read_text(errors="replace")


def until(happened: Callable[[], object], timeout_s: float = 120.0, said: Callable[[], str] = str) -> None:
    """Wait for something to be true; `said` is what went before if it never is."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s in vain\n{said()[-4000:]}"
        time.sleep(0.02)


def label(layout: Layout) -> str:
    """`fsdp2x4-halves`."""
    engine, world, *settings = layout
    return "-".join([f"{engine}x{world}", *settings])


def torchrun(world: int) -> list[str]:
    """The launcher's part of a command line, on a free port: runs beside each other do not meet."""
    elastic = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    return [*elastic, "--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(world)]


def environment(**env: str) -> dict[str, str]:
    """One thread per process, this checkout's code, and nothing of a launcher that may have started the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "MASTER_"))}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | env


def run(command: list[str], *, timeout_s: float = 600.0, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in the project's root, its output captured."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def run_ranks(world: int, command: list[str], *, timeout_s: float = 600.0, **env: str) -> str:
    """Run a Python file on `world` ranks, without a launcher and without their imports; return what they printed.

    Raises:
        AssertionError: a rank failed or hung; carries the output.
    """
    from forks import shared

    codes = shared().script(world, command, limit_s=timeout_s, env=env)
    printed = shared().stderr()
    assert codes == [0] * world, f"{codes}\n{printed[-8000:]}"
    return printed


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two equally long columns."""
    assert len(a) == len(b) == STEPS, (len(a), len(b))
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
