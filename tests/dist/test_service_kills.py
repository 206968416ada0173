"""Servers, job processes, the processes that look at files, and connections to the database, killed under load.

Every job ends as if undisturbed: none is lost, none runs twice, its events are those of a quiet server, in order.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from postgres_server import binaries, end_connections, postgres
from service_process import KEY, ServiceProcess, service

pytestmark = [pytest.mark.dist, pytest.mark.slow]
KILLS, JOBS = int(os.environ.get("DISTFT_KILLS", "12")), 6
MODELS = """
[limits]
jobs_side_by_side = 2
lost_starts = 100
[models.tiny]
path = "demo:tiny-llama"
chat_template = "plain"
[models.tiny.recipe]
model = { init = "random", dtype = "float32" }
method = { name = "full" }
optim = { learning_rate = 3e-3 }
checkpoint = { every_steps = 20 }
"""
ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"say {n % 8}"},
                             {"role": "assistant", "content": f"it is {n % 8}"}]}).encode() + b"\n"
    for n in range(64)
)  # fmt: skip


def make_job(client: openai.OpenAI, name: str) -> str:
    """Make a job; the same name makes one job, however often it is asked for."""
    header = {"Idempotency-Key": f"file {name}"}
    file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", extra_headers=header).id
    hyperparameters: Any = {"n_epochs": 40, "batch_size": 8}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    header = {"Idempotency-Key": f"job {name}"}
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=3, method=method, extra_headers=header, metadata={"name": name}
    ).id


def facts(client: openai.OpenAI, job_id: str) -> dict[str, Any]:
    """What a job has come to, without what is of its moment: steps, newest checkpoints, result file.

    A run keeps three checkpoints, and the one that it was last started from.
    """
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=1000)][::-1]
    job = client.fine_tuning.jobs.retrieve(job_id)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id, limit=100)
    return {
        "steps": [text for text in events if text.startswith("Step ")],
        "once": [events.count(text) for text in ("Files validated, moving job to queued state",
                                                 "The job has successfully completed")],
        "last": events[-1],
        "checkpoints": [(point.step_number, point.metrics.train_loss) for point in checkpoints][:3],
        "tokens": job.trained_tokens,
        "result": client.files.content(job.result_files[0]).text,
    }  # fmt: skip


class Load:
    """Clients that read all the time, and one that makes jobs; they live through every death of the server."""

    def __init__(self, server: ServiceProcess) -> None:
        self._server, self._stop = server, threading.Event()
        self.ids: dict[str, str] = {}
        self.statuses, self.refusals = Counter[int](), Counter[int]()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(3)]
        self._threads.append(threading.Thread(target=self._make, daemon=True))
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        chance = random.Random(threading.get_ident())
        while not self._stop.is_set():
            path = chance.choice(["/jobs?limit=100", *(f"/jobs/{job}/events?limit=100" for job in self.ids.values())])
            with suppress(httpx.TransportError):
                url = f"{self._server.url}/v1/fine_tuning{path}"
                self.statuses[httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30).status_code] += 1
            self._stop.wait(0.1)

    def _make(self) -> None:
        for number in range(JOBS):
            while str(number) not in self.ids and not self._stop.is_set():
                try:
                    with self._server.client() as client:
                        self.ids[str(number)] = make_job(client, str(number))
                except openai.APIConnectionError:
                    time.sleep(0.2)
                except openai.APIStatusError as error:
                    self.refusals[error.status_code] += 1
                    time.sleep(0.2)
            self._stop.wait(3)

    def end(self) -> None:
        """Stop reading, once all jobs are made."""
        self._threads[-1].join(timeout=300)
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert len(self.ids) == JOBS


def victims(server: ServiceProcess, kind: str) -> Iterator[int]:
    """Yield process ids."""
    for path in server.data.glob("jobs/*/process.json"):
        with suppress(OSError, ValueError, KeyError):
            content = json.loads(path.read_text(encoding="utf-8"))
            pid = content["pid"] if kind == "launcher" else content["child"]
            if kind in ("launcher", "job") and Path(f"/proc/{pid}").exists():
                yield pid
    for path in Path("/proc").glob("[0-9]*/cmdline") if kind == "examine" else ():
        with suppress(OSError):
            if b"distft.service.examine\0" + str(server.data).encode() in path.read_bytes():
                yield int(path.parent.name)


def kill_something(server: ServiceProcess, chance: random.Random, url: str | None) -> str:
    """Kill what a draw says; what is not there at the moment is drawn again."""
    while True:
        kind = chance.choice(["server", "launcher", "job", "examine", *(["database"] if url else [])])
        if kind == "server":
            server.kill()
            server.start()
            return kind
        if kind == "database" and url is not None:
            end_connections(url)
            return kind
        for pid in victims(server, kind):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return kind
        time.sleep(0.1)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_jobs_end_as_if_nothing_had_been_killed(database: str, tmp_path: Path) -> None:
    if database == "postgres" and binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    models = tmp_path / "models.toml"
    models.write_text(MODELS, encoding="utf-8")
    with service(tmp_path / "quiet", "--models", str(models)) as quiet, quiet.client() as client:
        job_id = make_job(client, "quiet")
        wait_for_end(client, job_id, within_s=600)
        undisturbed = facts(client, job_id)
    assert len(undisturbed["steps"]) == 320
    if database == "sqlite":
        killed_under_load(tmp_path, models, undisturbed, None)
    else:
        with postgres() as url:
            killed_under_load(tmp_path, models, undisturbed, url)


def killed_under_load(tmp_path: Path, models: Path, undisturbed: dict[str, Any], url: str | None) -> None:
    chance = random.Random(int(os.environ.get("DISTFT_SEED", "7")))
    server = ServiceProcess(
        tmp_path / "data", "--models", str(models), *(["--database", url] if url is not None else [])
    )
    kills: Counter[str] = Counter()
    try:
        load = Load(server)
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.2, 6))
            kills[kill_something(server, chance, url)] += 1
        load.end()
        with server.client() as client:
            for job_id in load.ids.values():
                wait_for_end(client, job_id, within_s=1500)
            for job_id in load.ids.values():
                assert facts(client, job_id) == undisturbed
            listed = [job.id for job in client.fine_tuning.jobs.list(limit=100)]
            names = {client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model for job_id in listed}
            files = [file.id for file in client.files.list(purpose="fine-tune")]
        assert sorted(listed) == sorted(load.ids.values()), "none is lost, none was made twice"
        assert len(names) == len(files) == JOBS
        assert {path.name for path in server.data.glob("jobs/ftjob-*")} == {*listed}
        assert {*load.statuses} <= {200, 503}, load.statuses
        assert {*load.refusals} <= {409, 503}, load.refusals  # the first try may be in flight; no database
        print(f"kills: {dict(kills)}; reads answered meanwhile: {dict(load.statuses)}")
        assert "Traceback" not in server.log or url is not None, "a look at a job that failed"
    finally:
        server.kill()
        server.end_jobs()


def wait_for_end(client: openai.OpenAI, job_id: str, *, within_s: float) -> None:
    """Wait until a job has succeeded; it never fails."""
    end = time.monotonic() + within_s
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status != "succeeded":
        assert time.monotonic() < end, job
        assert job.status not in ("failed", "cancelled"), job
        time.sleep(0.3)
