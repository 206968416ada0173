"""`distft serve --runner slurm` on a real Slurm: two jobs, one preempted, one paused and resumed from its page.

A `stop` fault (SIGSTOP) holds both at a chosen step, so that what happens to them there does not depend on who is
faster.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from page_client import PageClient
from service_process import KEY, ServiceProcess
from slurm import Cluster, Job

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
STEPS, HELD_AT = 24, 11
PATIENCE_S = 300.0


def wait(holds: Callable[[], object], what: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    """Of the job's events, oldest first."""
    return [event.message for event in reversed(list(client.fine_tuning.jobs.list_events(job_id, limit=1000)))]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


def in_order(found: list[str], *wanted: str) -> bool:
    """Whether these messages are among those that were found, in this order."""
    rest = iter(found)
    return all(any(re.fullmatch(pattern, message) for message in rest) for pattern in wanted)


@pytest.mark.dist
@pytest.mark.slow
def test_two_jobs_of_which_one_is_preempted_and_one_paused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    (tmp_path / "models.toml").write_text(MODELS, encoding="utf-8")
    (tmp_path / "site.toml").write_text("doctor = false\n", encoding="utf-8")
    arguments = ["--runner", "slurm", "--site", str(tmp_path / "site.toml"), "--models", str(tmp_path / "models.toml")]
    with monkeypatch.context() as patch:
        patch.setenv("DISTFT_FAULT", f"stop:rank=0,point=step,step={HELD_AT}")  # batch jobs have the server's variables
        server = ServiceProcess(tmp_path / "data", *arguments)
    try:
        visitor = PageClient(server.url, KEY)
        with server.client() as client:
            jobs = client.fine_tuning.jobs
            rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
            file_id = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
            method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}}
            preempted, paused = (
                jobs.create(model="tiny", training_file=file_id, seed=3, method=method).id  # type: ignore[arg-type]
                for _ in range(2)
            )

            def page(job_id: str) -> str:
                text = re.sub(r"<[^>]+>", " ", visitor.text(f"/jobs/{job_id}"))
                return " ".join(html.unescape(text).split())

            def batch_job(job_id: str) -> Job:
                number = cluster.ask("squeue", "--noheader", f"--name={job_id}", "--format=%i").strip()
                return Job(cluster, number, next((server.data / "jobs" / job_id).glob("job-*.out"), Path("none")))

            def held(job_id: str) -> bool:
                assert jobs.retrieve(job_id).status not in ("failed", "cancelled"), messages(client, job_id)
                return any(line.startswith(f"Step {HELD_AT}/{STEPS}") for line in messages(client, job_id))

            for job_id in (preempted, paused):
                wait(lambda job_id=job_id: held(job_id), lambda job_id=job_id: messages(client, job_id))
            numbers = {job_id: batch_job(job_id).id for job_id in (preempted, paused)}
            node = batch_job(preempted).fields()["NodeList"]
            assert f"Slurm runs job {numbers[preempted]} on {node}" in page(preempted)

            assert "Pause" in page(paused)
            assert visitor.post(f"/jobs/{paused}/pause").status_code == 303
            assert "saving, then it pauses" in page(paused)
            job = batch_job(paused)
            wait(lambda: (job.thaw(), jobs.retrieve(paused).status == "paused")[1], lambda: page(paused))
            assert "‖ paused" in page(paused)

            job = batch_job(preempted)
            urgent = cluster.submit("--wrap=sleep 6", "--partition=urgent", f"--nodelist={node}", "--exclusive")
            wait(lambda: (job.thaw(), int(job.fields()["Restarts"]))[1], lambda: page(preempted))
            wait(lambda: "… in the cluster's queue" in page(preempted), lambda: page(preempted))
            assert f"back in the queue of Slurm as job {job.id}" in page(preempted)
            server.kill()
        server.start()
        visitor = PageClient(server.url, KEY)
        with server.client() as client:
            jobs = client.fine_tuning.jobs
            assert visitor.post(f"/jobs/{paused}/resume").status_code == 303
            for job_id in (preempted, paused):
                wait(
                    lambda job_id=job_id: jobs.retrieve(job_id).status == "succeeded",
                    lambda job_id=job_id: (messages(client, job_id), batch_job(job_id).output),
                )
            assert urgent.end()["JobState"] == "COMPLETED"
            assert cluster.ask("squeue", "--noheader").strip() == ""
            for job_id in (preempted, paused):
                told = [line.partition(":")[0] for line in messages(client, job_id) if "training loss" in line]
                assert told == [f"Step {n}/{STEPS}" for n in range(1, STEPS + 1)], "each once, in order"
                assert "● succeeded" in page(job_id)
            number = numbers[preempted]
            assert in_order(
                messages(client, preempted), f"Queued in Slurm as job {number}\\.",
                rf"Slurm started job {number} on node\d\.", f"Slurm put job {number} back into its queue; .*",
                rf"Slurm restarted job {number} on node\d, restart 1\.", "The job has successfully completed",
            ), messages(client, preempted)  # fmt: skip
            assert in_order(
                messages(client, paused), f"Queued in Slurm as job {numbers[paused]}\\.",
                "The job was asked to save and stop\\.", r"The job is paused at step \d+\.", "The job goes on\\.",
                r"Queued in Slurm as job \d+\.", "The job has successfully completed",
            ), messages(client, paused)  # fmt: skip

            recipes = {job_id: visitor.text(f"/jobs/{job_id}/recipe.toml") for job_id in (preempted, paused)}
            assert recipes[paused].replace(paused, preempted) == recipes[preempted]
            (tmp_path / "recipe.toml").write_text(recipes[paused], encoding="utf-8")
            command = [sys.executable, "-m", "distft.train", str(tmp_path / "recipe.toml")]
            subprocess.run([*command, "--set", f'output_dir="{tmp_path}/undisturbed"'], check=True, capture_output=True)
            undisturbed = losses(tmp_path / "undisturbed" / paused)
            assert len(undisturbed) == STEPS
            for job_id in (preempted, paused):
                assert losses(server.data / "jobs" / job_id / "runs" / job_id) == undisturbed, "bit for bit"
    finally:
        server.kill()
        cluster.ask("scancel", "--me")
