"""Training on answers that a vLLM server writes: two ranks, a server that is killed, wrong weights, a stop.

An adapter (LoRA) and whole weights (full fine-tuning), against a stand-in that speaks its HTTP API, and against vLLM
itself where DISTFT_VLLM names a Python that has it (see tests/unit/export_formats/test_vllm.py).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
from harness import ROOT, Bench, Run
from vllm_process import START_S, answers, server_command, server_environment

VLLM = os.environ.get("DISTFT_VLLM", "")
STEPS = 6
REWARD = 'rollout.rewards=[{name="function", function="reward_of_letters:judge"}]'


@dataclass
class Server:
    """A process that serves `base`, on a port that stays when it is started again."""

    kind: str
    method: str
    base: Path
    log: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    started: list[float] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if self.kind == "stand-in":
            command = [sys.executable, str(ROOT / "tests/helpers/vllm_stand_in.py"), str(self.base), str(self.port)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
        else:
            command = [*server_command(VLLM, self.base, self.port), "--max-model-len", "256"]
            command += ["--logprobs-mode", "processed_logprobs"]
            command += ["--enable-lora", "--max-lora-rank", "8"] if self.method == "lora" else ["--enable-scale-out"]
            lora = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
            env = server_environment(**(lora if self.method == "lora" else {"VLLM_SERVER_DEV_MODE": "1"}))
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        self.started.append(time.time())

    def wait(self) -> None:
        began = time.monotonic()
        while not answers(f"{self.url}/health"):
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() - began < START_S, self.log.read_text()[-4000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill it and what it has started, at once."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


needs_vllm = pytest.mark.skipif(not VLLM, reason="DISTFT_VLLM names no Python that has vLLM")
SERVERS = [
    pytest.param((kind, method), id=f"{kind}-{method}", marks=[needs_vllm] if kind == "vllm" else [])
    for kind in ("stand-in", "vllm")
    for method in ("lora", "full")
]


@contextlib.contextmanager
def serving(kind: str, method: str, folder: Path, *, tied: bool) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = kit.save_model(folder / "base", tie_word_embeddings=tied)
    made = Server(kind, method, base, folder / "server.log", port)
    made.start()
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind, method = request.param
    with serving(kind, method, tmp_path_factory.mktemp("served"), tied=method == "lora") as made:
        yield made


def overrides(server: Server, *more: str) -> list[str]:
    is_lora = server.method == "lora"
    method, engine, rate = ("lora", "ddp", 3e-2) if is_lora else ("full", "fsdp2", 3e-3)
    return [
        f'model.path="{server.base}"', f'method={{name="{method}"{", r=4" if is_lora else ""}}}', REWARD,
        'objective={name="grpo"}',
        "rollout.answers_per_prompt=4", "rollout.max_new_tokens=12", "rollout.updates=2",
        f'rollout.generator={{name="vllm", url="{server.url}", restart_timeout_s={START_S}, connections=8}}',
        "data.packing=false", "data.eval=[]", "data.max_length=640", f"train.max_steps={STEPS}",
        f'engine.name="{engine}"', "train.micro_batch_size=1", 'checkpoint.every_steps="off"',
        f"optim.learning_rate={rate}",
        *more,
    ]  # fmt: skip


def lines(run: Run) -> list[list[dict[str, Any]]]:
    """Every answer, rollout by rollout."""
    assert run.folder is not None, run.error
    paths = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


@pytest.mark.slow
def test_a_run_on_a_servers_answers(bench: Bench, server: Server) -> None:
    """One run whose server is killed after its first rollout, and one that is stopped between two updates."""
    tag = f"vllm-{server.kind}-{server.method}"
    first = bench.folder / "runs" / f"{tag}-killed" / "rollouts" / "step-00000000.jsonl"

    def kill_and_start() -> None:
        while not first.exists():
            time.sleep(0.05)
        server.kill()
        time.sleep(1)
        server.start()

    killer = threading.Thread(target=kill_and_start, daemon=True)
    killer.start()
    cases = {"killed": overrides(server), "cut": overrides(server)}
    if server.method == "full":
        cases["zero3"] = overrides(server, 'engine.name="zero3"', "train.max_steps=4")
    cut = {"cut": {"fault": "term:rank=1,point=step,step=3"}}
    runs = bench.launch(2, cases, tag=tag, extra=cut, timeout_s=1800)
    killer.join(timeout=60)
    assert len(server.started) == 2
    killed, stopped = runs["killed"], runs["cut"]
    assert killed.folder is not None, killed.error
    assert "after step 3; the state is saved" in stopped.error, stopped.error
    stopped = bench.launch(2, {"cut": cases["cut"]}, tag=tag, timeout_s=1800)["cut"]

    rollouts = lines(killed)
    assert len(rollouts) == STEPS // 2
    policies = [{line["policy"] for line in rollout} for rollout in rollouts]
    assert all(len(names) == 1 for names in policies)
    assert len(set.union(*policies)) == len(policies), "a new policy after each update"
    kept = [path.name for path in (killed.folder / "rollouts" / "policy").iterdir()]
    assert kept == list(policies[-1])
    if server.method == "full":
        other = lines(runs["zero3"])
        assert {line["policy"] for line in other[0]} == policies[0], "the same bytes are gathered"
        assert max(runs["zero3"].column("sampler_gap")) < 1e-3
    for line in (line for rollout in rollouts for line in rollout):
        assert len(line["ids"]) == len(line["logprobs"]) <= 12
    assert max(killed.column("sampler_gap")) < 1e-3, "what is trained is what has written"
    assert max(map(abs, killed.column("loss")[1::2])) > 1e-4, "the second update is no first one"
    # Its answers are drawn from seeds: those of the run that was stopped and went on are the same, where the server
    # computes a row alike whatever stands beside it.
    if server.kind == "stand-in":
        assert lines(stopped) == rollouts
        assert stopped.column("loss") == killed.column("loss")
    assert [[line["id"] for line in rollout] for rollout in lines(stopped)] == [
        [line["id"] for line in rollout] for rollout in rollouts
    ]


@pytest.mark.slow
def test_a_server_with_another_base_is_noticed(bench: Bench, server: Server, tmp_path: Path) -> None:
    """An adapter needs the server's own base; whole weights take its place."""
    other = kit.save_model(tmp_path / "other", seed=1, tie_word_embeddings=server.method == "lora")
    tag = f"vllm-wrong-{server.kind}-{server.method}"
    cases = {"wrong": overrides(server, f'model.path="{other}"', "train.max_steps=4")}
    run = bench.launch(2, cases, tag=tag, timeout_s=600)["wrong"]
    if server.method == "full":
        assert max(run.column("sampler_gap")) < 1e-3, run.error
        return
    assert "NumericError" in run.error
    assert "is not the policy: its log-probabilities of" in run.error


@pytest.mark.slow
@needs_vllm
def test_a_head_that_the_server_does_not_read_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """On CPUs, vLLM 0.32 keeps the head that it was started with where that is tied to the embedding."""
    with serving("vllm", "full", tmp_path, tied=True) as tied:
        run = bench.launch(2, {"tied": overrides(tied)}, tag="vllm-tied", timeout_s=900)["tied"]
    assert "NumericError" in run.error
    assert "keeps its old head where that is tied to the embedding" in run.error
