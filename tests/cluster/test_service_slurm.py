"""`distft serve --runner slurm` on a real Slurm: two jobs, one requeued by Slurm, one paused and resumed."""

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from service_process import ServiceProcess
from slurm import Cluster

MODELS = """
[limits]
jobs_side_by_side = 2
[models.tiny]
path = "demo:tiny-llama"
chat_template = "plain"
gpus_per_node = 0
[models.tiny.recipe]
model = { init = "random", dtype = "float32" }
method = { name = "full" }
optim = { learning_rate = 3e-3 }
"""
ROWS = [
    {"messages": [{"role": "user", "content": f"say {n % 8}"}, {"role": "assistant", "content": f"it is {n % 8}"}]}
    for n in range(64)
]
PATIENCE_S = 1200.0


def wait(client: openai.OpenAI, job_id: str, status: str, *, step: int = 0) -> Any:
    end = time.monotonic() + PATIENCE_S
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status == status and len(steps(client, job_id)) >= step:
            return job
        assert job.status not in ("failed", "cancelled"), job
        assert time.monotonic() < end, job
        time.sleep(0.3)


def steps(client: openai.OpenAI, job_id: str) -> list[str]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=1000)
    return [event.message for event in reversed(list(events)) if "training loss" in event.message]


@pytest.mark.dist
@pytest.mark.slow
def test_two_jobs_of_which_one_is_requeued_and_one_paused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    (tmp_path / "models.toml").write_text(MODELS, encoding="utf-8")
    (tmp_path / "site.toml").write_text("doctor = false\n", encoding="utf-8")
    arguments = ["--runner", "slurm", "--site", str(tmp_path / "site.toml"), "--models", str(tmp_path / "models.toml")]
    server = ServiceProcess(tmp_path / "data", *arguments)
    try:
        with server.client() as client:
            rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
            file_id = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
            method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 8}}}
            first, second = (
                client.fine_tuning.jobs.create(model="tiny", training_file=file_id, seed=3, method=method).id
                for _ in range(2)
            )
            wait(client, first, "running", step=3)
            client.fine_tuning.jobs.pause(first)
            wait(client, second, "running", step=3)
            number = cluster.ask("squeue", "--noheader", f"--name={second}", "--format=%i").strip()
            cluster.ask("scontrol", "requeue", number)
            wait(client, first, "paused")
            server.kill()
        server.start()
        with server.client() as client:
            client.fine_tuning.jobs.resume(first)
            for job_id in (first, second):
                wait(client, job_id, "succeeded")
            assert len(steps(client, first)) == 400
            assert steps(client, first) == steps(client, second)
        assert cluster.ask("squeue", "--noheader").strip() == ""
    finally:
        server.kill()
        cluster.ask("scancel", "--me")
