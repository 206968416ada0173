"""`distft serve` as a process, with jobs that train: from an upload to an answer, and through every kind of death."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from service_process import KEY, ServiceProcess, service

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n % 8}"}, {"role": "assistant", "content": f"it is {n % 8}"}]}
    for n in range(64)
]


def rows(count: int = 64) -> bytes:
    return "".join(json.dumps(ROWS[n % 64]) + "\n" for n in range(count)).encode()


def make_job(client: openai.OpenAI, *, epochs: int = 10, **more: Any) -> str:
    file_id = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id
    hyperparameters: Any = {"n_epochs": epochs, "batch_size": 8}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, seed=3, method=method, **more).id


def wait_for(client: openai.OpenAI, job_id: str, *statuses: str, within_s: float = 600) -> Any:
    end = time.monotonic() + within_s
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < end, job
        assert job.status not in ("failed", "cancelled"), job
        time.sleep(0.2)
    return job


def step_events(client: openai.OpenAI, job_id: str) -> list[str]:
    events = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=1000) if event.type == "metrics"]
    return [event.message for event in reversed(events) if "training" in event.message]


def at_step(client: openai.OpenAI, job_id: str, step: int, within_s: float = 300) -> None:
    end = time.monotonic() + within_s
    while len(step_events(client, job_id)) < step:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.dist
def test_from_an_upload_to_an_answer(tmp_path: Path) -> None:
    with service(tmp_path / "data") as server, server.client() as client:
        job = wait_for(client, make_job(client, suffix="says"), "succeeded")
        assert job.fine_tuned_model.startswith("ft:tiny:default:says:")
        steps = step_events(client, job.id)
        assert [line.split(":")[0] for line in steps] == [f"Step {n}/80" for n in range(1, 81)]
        asked: Any = {
            "model": job.fine_tuned_model,
            "messages": [{"role": "user", "content": "say 3"}],
            "temperature": 0,
        }
        answer = client.chat.completions.create(**asked, max_tokens=20, logprobs=True, top_logprobs=2)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("it is 3", "stop")
        assert answer.choices[0].logprobs is not None
        tokens = answer.choices[0].logprobs.content or []
        assert "".join(token.token for token in tokens) == "it is 3"
        assert all(token.top_logprobs[0].logprob == token.logprob > -0.5 for token in tokens)
        pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == "it is 3"
        assert len([piece for piece in pieces[:-1] if piece.choices[0].delta.content]) > 1
        assert pieces[-2].choices[0].finish_reason == "stop"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens
        cut = client.chat.completions.create(**asked, stop=[" is"])
        assert cut.choices[0].message.content == "it"
        checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
        texts = client.completions.create(
            model=checkpoint.fine_tuned_model_checkpoint,
            prompt=["say 1", "say 2"],
            n=2,
            max_tokens=3,
            seed=1,
            logprobs=1,
        )
        assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
        assert server.stop() == 0


METHODS_MODELS = """
[models.tiny]
path = "demo:tiny-llama"
chat_template = "plain"
max_tokens = 6
[models.tiny.recipe]
model = { init = "random", dtype = "float32" }
method = { name = "full" }
optim = { learning_rate = 1e-2 }
"""
PAIRS = [
    {"input": {"messages": [{"role": "user", "content": f"say {n % 4}"}]},
     "preferred_output": [{"role": "assistant", "content": f"it is {n % 4}"}],
     "non_preferred_output": [{"role": "assistant", "content": "never"}]}
    for n in range(32)
]  # fmt: skip
ASKED = [{"messages": [{"role": "user", "content": f"say {n % 4}"}], "wanted": "aeio"[n % 4]} for n in range(16)]


def losses(run: Path) -> list[float]:
    """Losses of a run, step by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


@pytest.mark.dist
@pytest.mark.slow
def test_jobs_of_dpo_and_reinforcement_are_what_their_recipes_train(tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(METHODS_MODELS, encoding="utf-8")
    with service(tmp_path / "data", "--models", str(models)) as server, server.client() as client:

        def upload(rows: list[Any]) -> str:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id

        hyperparameters: Any = {"n_epochs": 2, "batch_size": 8, "beta": 0.2}
        dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
        grader = {"type": "string_check", "name": "letter", "operation": "like", "input": "{{sample.output_text}}",
                  "reference": "{{item.wanted}}"}  # fmt: skip
        hyperparameters = {"n_epochs": 2, "batch_size": 8, "compute_multiplier": 0.5}
        reinforcement: Any = {
            "type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}
        }  # fmt: skip
        create = client.fine_tuning.jobs.create
        pairs = create(model="tiny", training_file=upload(PAIRS), seed=5, method=dpo)
        asked = create(
            model="tiny", training_file=upload(ASKED), validation_file=upload(ASKED[:4]), seed=5, method=reinforcement
        )
        for made in (pairs, asked):
            job = wait_for(client, made.id, "succeeded")
            steps = step_events(client, job.id)
            assert len(steps) == (8 if made is pairs else 4), steps
            recipe = tmp_path / f"{job.id}.toml"
            recipe.write_text(client.get(f"/fine_tuning/jobs/{job.id}/recipe", cast_to=str), encoding="utf-8")
            runs = tmp_path / "again"
            command = [sys.executable, "-m", "distft.train", str(recipe), "--set", f'output_dir="{runs}"']
            subprocess.run(command, check=True, capture_output=True)
            again = losses(runs / job.id)
            assert again == losses(server.data / "jobs" / job.id / "runs" / job.id), "the same recipe, bit for bit"
            assert [line.partition("=")[2][:6] for line in steps] == [f"{loss:.4f}"[:6] for loss in again]
            points = client.fine_tuning.jobs.checkpoints.list(job.id).data
            assert points[0].step_number == len(steps)
            answer = client.chat.completions.create(
                model=job.fine_tuned_model, messages=[{"role": "user", "content": "say 1"}], max_tokens=4
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens <= 4
        events = [event for event in client.fine_tuning.jobs.list_events(asked.id, limit=1000) if event.data]
        rewards = [event.data["train_reward_mean"] for event in events if "train_reward_mean" in event.data]
        assert len(rewards) == 4
        assert all(0 <= reward <= 1 for reward in rewards)
        held_out = [event.data["valid_reward_mean"] for event in events if "valid_reward_mean" in event.data]
        assert len(held_out) >= 2, "before, after each epoch"
        assert job.method.reinforcement.grader.model_dump() == grader
        assert job.method.reinforcement.hyperparameters.eval_interval == 2
        table = client.files.content(job.result_files[0]).text.splitlines()
        assert table[0].split(",")[-2:] == ["train_reward_mean", "valid_reward_mean"]
        assert len(table) == 5


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_server_finds_its_job_which_is_paused_and_resumed(tmp_path: Path) -> None:
    with service(tmp_path / "quiet") as quiet, quiet.client() as client:
        job = wait_for(client, make_job(client, epochs=50), "succeeded")
        undisturbed, tokens = step_events(client, job.id), job.trained_tokens
    server = ServiceProcess(tmp_path / "data")
    try:
        with server.client() as client:
            job_id = make_job(client, epochs=50)
            at_step(client, job_id, 5)
            server.kill()
        server.start()
        with server.client() as client:
            client.fine_tuning.jobs.pause(job_id)
            wait_for(client, job_id, "paused")
            paused_at = len(step_events(client, job_id))
            assert 5 <= paused_at < len(undisturbed)
            time.sleep(1)
            assert len(step_events(client, job_id)) == paused_at
            client.fine_tuning.jobs.resume(job_id)
            job = wait_for(client, job_id, "succeeded")
            assert step_events(client, job_id) == undisturbed, "bit for bit"
            assert job.trained_tokens == tokens
    finally:
        server.kill()
        server.end_jobs()


@pytest.mark.dist
@pytest.mark.slow
def test_the_first_key_and_who_may_listen(tmp_path: Path) -> None:
    with service(tmp_path / "data", key=None) as server:
        key = next(line.rpartition(" ")[2] for line in server.said if line.startswith("first admin key"))
        assert key not in server.log
        with openai.OpenAI(api_key=key, base_url=f"{server.url}/v1") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.BadRequestError, match="no weights"):
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}])
        with pytest.raises(AssertionError, match="another server works with this folder"):
            ServiceProcess(tmp_path / "data")
    with pytest.raises(AssertionError, match="without a key this machine alone may ask"):
        ServiceProcess(tmp_path / "other", "--host", "0.0.0.0", key=None)
    assert KEY not in server.log

    async def drive() -> None:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0) as made:
            with pytest.raises(openai.APIConnectionError):
                await made.models.list()

    asyncio.run(drive())
