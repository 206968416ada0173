"""The API through the unmodified `openai` client: every method of it, its pages, its errors, and who may see what."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(
            tmp_path_factory.mktemp("service"), file_mib=0.2, request_mib=0.1, slowest_upload_s=1.0
        ) as running:
            yield running


@pytest.fixture
def client(server: ServiceServer) -> Iterator[openai.OpenAI]:
    server.runner.ends_at_once = True
    with server.client() as made:
        yield made
    server.runner.end_all(server.settings.jobs)  # a test that failed must not fill the places of the next ones


CHECK = {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}",
         "reference": "{{item.answer}}"}  # fmt: skip


def upload(client: openai.OpenAI, *rows: Any, name: str = "rows.jsonl", **more: Any) -> str:
    return client.files.create(file=(name, jsonl(*(rows or (CHAT,)))), purpose="fine-tune", **more).id


def ended(client: openai.OpenAI, job_id: str) -> Any:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled"))
    return client.fine_tuning.jobs.retrieve(job_id)


def new_project(client: openai.OpenAI, name: str, role: str = "member") -> tuple[str, str]:
    """Id of a new project, and a key of it."""
    project = client.post("/organization/projects", body={"name": name}, cast_to=dict)
    path = f"/organization/projects/{project['id']}/api_keys"
    return project["id"], client.post(path, body={"name": "k", "role": role}, cast_to=dict)["value"]


def test_a_job_from_its_file_to_its_model(client: openai.OpenAI, server: ServiceServer) -> None:
    file_id = upload(client)
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, validation_file=file_id, suffix="mine", seed=7, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )  # fmt: skip
    assert (job.status, job.seed, job.metadata, job.fine_tuned_model) == ("validating_files", 7, {"team": "a"}, None)
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    job = ended(client, job.id)
    assert job.status == "succeeded", job
    assert job.hyperparameters.batch_size == 1, "auto is answered with the value that was chosen"
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters == job.hyperparameters or job.hyperparameters.n_epochs == 2
    assert job.trained_tokens == 40
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny:default:mine:")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    messages = [event.message for event in reversed(events)]
    assert messages[:2] == [f"Created fine-tuning job: {job.id}", f"Validating training file: {file_id}"]
    steps = [event for event in reversed(events) if event.type == "metrics"]
    assert [event.message for event in steps] == [f"Step {n}/4: training loss={1 / n:.4f}" for n in range(1, 5)]
    assert messages[-1] == "The job has successfully completed"
    points = client.fine_tuning.jobs.checkpoints.list(job.id, limit=3)
    assert [point.step_number for point in points.data] == [4, 3, 2]
    assert points.has_more
    assert points.data[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4"
    assert points.data[1].metrics.train_loss == pytest.approx(1 / 3)
    assert [point.step_number for point in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)] == [4, 3, 2, 1]
    result = client.files.content(job.result_files[0]).text.splitlines()
    assert result[0].startswith("step,train_loss")
    assert [line.split(",")[0] for line in result[1:]] == ["1", "2", "3", "4"]
    recipe = client.get(f"/fine_tuning/jobs/{job.id}/recipe", cast_to=str)
    assert "name =" in recipe
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(job.fine_tuned_model).owned_by == job.organization_id
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


def test_a_job_of_reinforcement_has_its_grader(client: openai.OpenAI) -> None:
    hyperparameters: Any = {"compute_multiplier": "auto", "eval_interval": 3}
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": CHECK, "hyperparameters": hyperparameters}}
    made = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client), method=method)
    for job in (made, ended(client, made.id)):
        assert job.method is not None
        assert job.method.reinforcement is not None
        assert job.method.reinforcement.grader.model_dump() == CHECK
        assert job.method.reinforcement.hyperparameters is not None
        assert job.method.reinforcement.hyperparameters.eval_interval == 3
        answered = job.method.reinforcement.hyperparameters.compute_multiplier
        assert answered == (1 if job.status == "succeeded" else "auto")


def test_what_is_deleted_is_gone_and_counts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path, files_per_project=3, project_gib=3000 / 2**30, unfinished_per_project=1) as server:
        blobs = server.settings.blobs
        with server.client() as client:
            first, second = upload(client), upload(client, name="same.jsonl")
            made = client.uploads.create(filename="u", purpose="fine-tune", bytes=100, mime_type="text/plain")
            with pytest.raises(openai.RateLimitError, match="has 3 files"):
                upload(client)
            with pytest.raises(openai.RateLimitError, match="has 3 files"):
                client.uploads.create(filename="u", purpose="fine-tune", bytes=1, mime_type="text/plain")
            client.uploads.cancel(made.id)
            with pytest.raises(openai.RateLimitError, match="more bytes"):
                client.uploads.create(filename="u", purpose="fine-tune", bytes=3000, mime_type="text/plain")
            client.files.delete(first)
            third = upload(client, {**CHAT, "n": 1})
            job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=second).id)
            other = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=second).id)
            folder = server.folder(job.id).path
            project, key = new_project(client, "guests")
            permissions = client.fine_tuning.checkpoints.permissions
            checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
            for name in (job.fine_tuned_model, checkpoint):
                permissions.create(name, project_ids=[project])
            with server.client(key) as guest:
                with pytest.raises(openai.NotFoundError):
                    guest.delete(f"/fine_tuning/jobs/{job.id}", cast_to=dict)
                deleted = client.delete(f"/fine_tuning/jobs/{job.id}", cast_to=dict)
                assert deleted == {"id": job.id, "object": "fine_tuning.job", "deleted": True}
                assert sorted(model.id for model in guest.models.list()) == ["chat-only", "tiny"]
            assert not folder.exists()
            gone = [
                lambda: client.fine_tuning.jobs.retrieve(job.id),
                lambda: client.fine_tuning.jobs.list_events(job.id),
                lambda: client.fine_tuning.jobs.checkpoints.list(job.id),
                lambda: client.models.retrieve(job.fine_tuned_model),
                lambda: client.models.retrieve(checkpoint),
                lambda: client.files.retrieve(job.result_files[0]),
                lambda: permissions.list(checkpoint),
                lambda: client.delete(f"/fine_tuning/jobs/{job.id}", cast_to=dict),
            ]
            for attempt in gone:
                with pytest.raises(openai.NotFoundError):
                    attempt()
            assert [entry.id for entry in client.fine_tuning.jobs.list()] == [other.id]
            assert client.files.content(second).content == jsonl(CHAT), "what people uploaded stays"
            assert client.files.content(other.result_files[0]).text.startswith("step,"), (
                "the same content, of another job"
            )
            server.runner.ends_at_once = False
            running = client.fine_tuning.jobs.create(model="tiny", training_file=third)
            for status in ("validating_files", "queued", "running"):
                with pytest.raises(openai.BadRequestError, match="cancel it first"):
                    client.delete(f"/fine_tuning/jobs/{running.id}", cast_to=dict)
                if status != "running":
                    wait_until(lambda: client.fine_tuning.jobs.retrieve(running.id).status == "running")
            with pytest.raises(openai.RateLimitError, match="have not ended"):
                client.fine_tuning.jobs.create(model="tiny", training_file=third)
            client.fine_tuning.jobs.cancel(running.id)
            wait_until(lambda: running.id not in server.runner.alive)

            def removed() -> bool:
                try:
                    client.delete(f"/fine_tuning/jobs/{running.id}", cast_to=dict)
                except openai.ConflictError:  # its process is still ending
                    return False
                return True

            wait_until(removed)
            for file_id in (second, third):
                client.files.delete(file_id)
            wait_until(lambda: len(list(blobs.glob("??/*"))) == 1)
            orphan = blobs / "ab" / ("c" * 62)
            orphan.parent.mkdir(exist_ok=True)
            orphan.write_bytes(b"of a server that was killed")
        stray = server.settings.jobs / "ftjob-stray"
        stray.mkdir()
    with serving(tmp_path) as server, server.client() as client:
        wait_until(lambda: not orphan.exists() and not stray.exists())
        assert client.files.content(other.result_files[0]).text.startswith("step,")


def test_a_job_that_does_not_fit_keeps_what_check_found(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, {"prompt": "too large"}))
    job = ended(client, job.id)
    assert (job.status, job.error.code, job.error.message) == ("failed", "does_not_fit", "lower it")
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages[0] == "The job failed: lower it"
    assert messages[1] == "4 rows", "what check found"


def test_a_killed_look_at_the_files_is_made_again(client: openai.OpenAI, server: ServiceServer) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, {"prompt": "killed twice"}))
    assert ended(client, job.id).status == "succeeded"
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, {"prompt": "always killed"}))
    job = ended(client, job.id)
    assert (job.status, job.error.code) == ("failed", "validation_failed")
    assert (server.folder(job.id).path / "tries").read_text() == "xxxx", (
        "once, and again as often as a run that is lost"
    )


def test_pages_and_filters(client: openai.OpenAI) -> None:
    file_id = upload(client)
    ids = [
        client.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, metadata={"page": "yes", "n": str(n)} if n else None
        ).id
        for n in range(4)
    ]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert [job_id for job_id in listed if job_id in ids] == ids[::-1]
    first = client.fine_tuning.jobs.list(limit=2, metadata={"page": "yes"})
    assert [job.id for job in first.data] == ids[:1:-1]
    assert first.has_more
    after = client.fine_tuning.jobs.list(limit=2, metadata={"page": "yes"}, after=first.data[-1].id)
    assert ([job.id for job in after.data], after.has_more) == ([ids[1]], False)
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "2", "page": "yes"})] == [ids[2]]
    none = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert ids[0] in [job.id for job in none.data]
    assert not {*ids[1:]} & {job.id for job in none.data}
    for job_id in ids:
        ended(client, job_id)


def test_files_and_uploads(client: openai.OpenAI, server: ServiceServer) -> None:
    content = jsonl(CHAT)
    first = client.files.create(
        file=("a b.jsonl", content), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (first.bytes, first.filename, first.status) == (len(content), "a b.jsonl", "processed")
    assert first.expires_at == first.created_at + 3600
    assert client.files.content(first.id).content == content
    second = upload(client, CHAT, name="b.jsonl")
    blobs = server.settings.blobs
    assert len(list(blobs.glob("??/*"))) >= 1
    assert client.files.list(purpose="fine-tune", order="desc", limit=1).data[0].id == second
    assert [entry.id for entry in client.files.list(limit=1, after=second).data] == [first.id]
    assert client.files.delete(first.id).deleted
    assert client.files.content(second).content == content, "the other file's content is the same, and stays"
    client.files.delete(second)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(second)

    halves = (content[:20], content[20:])
    upload_ = client.uploads.create(
        bytes=len(content), filename="parts.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    parts = [client.uploads.parts.create(upload_.id, data=half).id for half in halves]
    with pytest.raises(openai.BadRequestError, match="md5"):
        client.uploads.complete(upload_.id, part_ids=parts, md5="0" * 32)
    with pytest.raises(openai.BadRequestError, match="bytes"):
        client.uploads.complete(upload_.id, part_ids=parts[:1])
    done = client.uploads.complete(upload_.id, part_ids=parts, md5=hashlib.md5(content).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).content == content
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.cancel(upload_.id)
    other = client.uploads.create(bytes=4, filename="c", mime_type="text/plain", purpose="fine-tune")
    assert client.uploads.cancel(other.id).status == "cancelled"


def test_cancel_pause_and_resume(client: openai.OpenAI, server: ServiceServer) -> None:
    server.runner.ends_at_once = False
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=upload(client))
    folder = server.folder(job.id)
    wait_until(lambda: jobs.retrieve(job.id).status == "running")
    wait_until(lambda: job.id in server.runner.alive)
    server.runner.write_steps(folder, range(1, 3))
    assert jobs.pause(job.id).status == "running", "it is paused once it has saved"
    wait_until(folder.stop_file.exists)
    server.runner.end(folder, code=75, reason="preempted: asked")
    wait_until(lambda: jobs.retrieve(job.id).status == "paused")
    assert not folder.stop_file.exists()
    with pytest.raises(openai.BadRequestError, match="paused"):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status == "queued"
    wait_until(lambda: server.runner.starts.count(job.id) == 2)
    # the run goes back to its last checkpoint: what it writes again is no second event
    (folder.run / "metrics.jsonl").unlink()
    server.runner.write_steps(folder, range(1, 5))
    server.runner.end(folder)
    assert ended(client, job.id).status == "succeeded"
    steps = [event.message for event in jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert steps == [f"Step {n}/4: training loss={1 / n:.4f}" for n in (4, 3, 2, 1)]
    with pytest.raises(openai.BadRequestError, match="succeeded"):
        jobs.cancel(job.id)

    job = jobs.create(model="tiny", training_file=upload(client))
    wait_until(lambda: job.id in server.runner.alive)
    assert jobs.cancel(job.id).status == "cancelled"
    wait_until(lambda: job.id not in server.runner.alive)
    assert jobs.retrieve(job.id).status == "cancelled"


def test_a_checkpoint_whose_step_was_never_told_holds_nobody_up(client: openai.OpenAI, server: ServiceServer) -> None:
    """The run was killed between a save and its record; it makes both again, or ends without them."""
    server.runner.ends_at_once = False
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=upload(client))
    folder = server.folder(job.id)
    wait_until(lambda: job.id in server.runner.alive)
    point = folder.run / "checkpoints/step-00000003"
    point.mkdir(parents=True)
    (point / "MANIFEST.json").write_text("{}")
    server.runner.write_steps(folder, range(1, 3))
    wait_until(lambda: len(jobs.checkpoints.list(job.id).data) == 2, within_s=10)
    server.runner.write_steps(folder, range(3, 5))
    server.runner.end(folder)
    assert ended(client, job.id).status == "succeeded"
    assert [point.step_number for point in jobs.checkpoints.list(job.id)] == [4, 3, 2, 1]


def test_what_an_evaluation_measures_is_told_everywhere(client: openai.OpenAI, server: ServiceServer) -> None:
    server.runner.ends_at_once = False
    file_id = upload(client, CHAT)
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, validation_file=file_id).id
    wait_until(lambda: job_id in server.runner.alive)
    folder = server.folder(job_id)
    server.runner.write_steps(folder, range(1, 4))
    measured = {"step": 4, "eval_loss": 0.5, "eval_tokens": 8.0, "eval_token_accuracy": 0.75}
    with (folder.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(measured) + "\n")  # a run measures, then saves
    server.runner.write_steps(folder, range(4, 5))
    server.runner.end(folder)
    job = ended(client, job_id)
    assert job.status == "succeeded"
    events = [event.data or {} for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    (told,) = [data for data in events if "full_valid_loss" in data]
    assert (told["full_valid_loss"], told["full_valid_mean_token_accuracy"]) == (0.5, 0.75)
    last = client.fine_tuning.jobs.checkpoints.list(job_id).data[0]
    assert last.step_number == 4
    assert (last.metrics.full_valid_loss, last.metrics.full_valid_mean_token_accuracy) == (0.5, 0.75)
    assert last.metrics.train_mean_token_accuracy is None, "training is not measured"
    rows = [line.split(",") for line in client.files.content(job.result_files[0]).text.splitlines()]
    assert dict(zip(rows[0], rows[4], strict=True))["valid_mean_token_accuracy"] == "0.75"
    assert dict(zip(rows[0], rows[3], strict=True))["valid_mean_token_accuracy"] == ""


def test_runs_that_fail_or_vanish(client: openai.OpenAI, server: ServiceServer) -> None:
    jobs = client.fine_tuning.jobs
    job = ended(client, jobs.create(model="tiny", training_file=upload(client, {"broken": 1})).id)
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")

    server.runner.ends_at_once = False
    job = jobs.create(model="tiny", training_file=upload(client))
    folder = server.folder(job.id)
    for start in range(1, 3):
        wait_until(lambda start=start: server.runner.starts.count(job.id) == start and job.id in server.runner.alive)
        server.runner.write_steps(folder, range(start, start + 1))
        server.runner.end(folder, code=None)
    wait_until(lambda: server.runner.starts.count(job.id) == 3)
    server.runner.end(folder, code=5, reason=f"numeric: {folder.path}/runs/{job.id}: loss is nan")
    job = ended(client, job.id)
    assert job.error.code == "numeric_error"
    assert str(server.data) not in job.error.message, "a message shows no path of the server"

    job = jobs.create(model="tiny", training_file=upload(client))
    for start in range(1, 5):
        wait_until(lambda start=start: server.runner.starts.count(job.id) == start and job.id in server.runner.alive)
        server.runner.end(server.folder(job.id), code=None)
    assert ended(client, job.id).error.code == "process_lost"


def test_the_queue(client: openai.OpenAI, server: ServiceServer) -> None:
    server.runner.ends_at_once = False
    server.runner.most_alive = 0
    file_id = upload(client)
    ids = [client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id for _ in range(5)]
    wait_until(lambda: {*ids[:4]} <= server.runner.alive)
    urgent = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body={"priority": 5}).id
    wait_until(lambda: client.fine_tuning.jobs.retrieve(urgent).status == "queued")
    wait_until(lambda: client.fine_tuning.jobs.retrieve(ids[4]).status == "queued")
    server.runner.end(server.folder(ids[0]))
    wait_until(lambda: urgent in server.runner.alive)
    assert client.fine_tuning.jobs.retrieve(ids[4]).status == "queued"
    for job_id in (*ids[1:4], urgent):
        server.runner.end(server.folder(job_id))
    wait_until(lambda: ids[4] in server.runner.alive)
    server.runner.end(server.folder(ids[4]))
    assert all(ended(client, job_id).status == "succeeded" for job_id in (*ids, urgent))
    assert server.runner.most_alive == 4
    assert all(server.runner.starts.count(job_id) == 1 for job_id in ids)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-4o-mini"}, "model", "model_not_available"),
        ({"training_file": "file-none"}, "training_file", "invalid_file_id"),
        ({"training_file": "../../etc/passwd"}, "training_file", "invalid_value"),
        ({"suffix": "../x"}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "invalid_value"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}},
            "method.reinforcement.grader.type",
            "invalid_value",
        ),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python", "source": "1"}}}},
            "method.reinforcement.grader.type",
            "unsupported_grader",
        ),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {"grader": CHECK, "hyperparameters": {"reasoning_effort": "high"}},
                }
            },
            "method.reinforcement.hyperparameters.reasoning_effort",
            "unsupported_parameter",
        ),
        (
            {"model": "chat-only", "method": {"type": "reinforcement", "reinforcement": {"grader": CHECK}}},
            "method.type",
            "unsupported_method",
        ),
        ({"model": "chat-only", "method": {"type": "dpo"}}, "method.type", "unsupported_method"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
            "method.dpo.hyperparameters.beta.float",
            "invalid_value",
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs.int", "invalid_value"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": "e"}}]},
            "integrations.wandb.entity",
            "unsupported_parameter",
        ),
    ],
)
def test_what_a_job_cannot_ask_for(client: openai.OpenAI, change: Any, param: str, code: str) -> None:
    body = {"model": "tiny", "training_file": upload(client), **change}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/fine_tuning/jobs", body=body, cast_to=dict)
    assert refused.value.code == code, refused.value
    assert str(refused.value.param).startswith(param.removesuffix(".int").removesuffix(".float"))
    assert refused.value.type == "invalid_request_error"


def raw(server: ServiceServer, path: str, *, key: str | None = ADMIN_KEY, **options: Any) -> tuple[int, Any, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(server.root + path, headers=headers | options.pop("headers", {}), **options)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_error_classes(client: openai.OpenAI, server: ServiceServer) -> None:
    with pytest.raises(openai.AuthenticationError), server.client("sk-wrong") as wrong:
        wrong.models.list()
    assert raw(server, "/v1/models", key=None)[0] == 401
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-none")
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.get("/nothing", cast_to=dict)
    status, body, headers = raw(server, "/v1/fine_tuning/jobs", method="PUT", data=b"{}")
    assert (status, json.loads(body)["error"]["code"]) == (405, "method_not_allowed")
    assert headers["x-request-id"].startswith("req_")
    for data, code in (
        (b"{", "invalid_json"),
        (b"[]", "invalid_value"),
        (b'{"model": "tiny"}', "missing_required_parameter"),
    ):
        status, body, _ = raw(server, "/v1/fine_tuning/jobs", data=data, headers={"Content-Type": "application/json"})
        assert (status, json.loads(body)["error"]["code"]) == (400, code)
    with pytest.raises(openai.BadRequestError, match="Unknown query parameter"):
        client.fine_tuning.jobs.list(extra_query={"colour": "red"})
    _, viewer = new_project(client, "viewers", "viewer")
    with pytest.raises(openai.PermissionDeniedError), server.client(viewer) as made:
        upload(made)
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=("big", b"x" * 300_000), purpose="fine-tune")
    assert large.value.status_code == 413
    status, body, _ = raw(
        server, "/v1/fine_tuning/jobs", data=b"x" * 200_000, headers={"Content-Type": "application/json"}
    )
    assert status == 413


def test_a_repeated_request_makes_one_job(client: openai.OpenAI) -> None:
    file_id = upload(client)
    header = {"Idempotency-Key": "k1"}
    make = client.fine_tuning.jobs.create
    first = make(model="tiny", training_file=file_id, extra_headers=header)
    assert make(model="tiny", training_file=file_id, extra_headers=header).id == first.id
    with pytest.raises(openai.ConflictError):
        make(model="tiny", training_file=file_id, seed=1, extra_headers=header)
    ended(client, first.id)


def test_projects_do_not_see_each_other(client: openai.OpenAI, server: ServiceServer) -> None:
    project, key = new_project(client, "others")
    file_id = upload(client)
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="secret").id)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    with server.client(key) as other:
        assert other.files.list().data == []
        assert other.fine_tuning.jobs.list().data == []
        assert sorted(model.id for model in other.models.list()) == ["chat-only", "tiny"]
        attempts = [
            lambda: other.files.retrieve(file_id),
            lambda: other.files.content(file_id),
            lambda: other.files.delete(file_id),
            lambda: other.files.list(after=file_id),
            lambda: other.fine_tuning.jobs.retrieve(job.id),
            lambda: other.fine_tuning.jobs.cancel(job.id),
            lambda: other.fine_tuning.jobs.list_events(job.id),
            lambda: other.fine_tuning.jobs.checkpoints.list(job.id),
            lambda: other.fine_tuning.jobs.list(after=job.id),
            lambda: other.models.retrieve(job.fine_tuned_model),
            lambda: other.models.delete(job.fine_tuned_model),
            lambda: other.models.retrieve(checkpoint),
            lambda: other.chat.completions.create(
                model=job.fine_tuned_model, messages=[{"role": "user", "content": "?"}]
            ),
        ]
        absent = {"file": "file-" + "x" * 24, "ftjob": "ftjob-" + "x" * 24}
        for attempt in attempts:
            with pytest.raises(openai.NotFoundError) as refused:
                attempt()
            assert "secret" not in str(refused.value).replace(job.fine_tuned_model, "").replace(checkpoint, "")
        with pytest.raises(openai.NotFoundError) as hidden:
            other.files.retrieve(file_id)
        with pytest.raises(openai.NotFoundError) as none:
            other.files.retrieve(absent["file"])
        assert str(hidden.value).replace(file_id, "") == str(none.value).replace(absent["file"], "")
        with pytest.raises(openai.BadRequestError, match="no such file"):
            other.fine_tuning.jobs.create(model="tiny", training_file=file_id)
        with pytest.raises(openai.PermissionDeniedError):
            other.get("/organization/projects", cast_to=dict)

        permissions = client.fine_tuning.checkpoints.permissions
        made = permissions.create(checkpoint, project_ids=[project]).data[0]
        assert [entry.project_id for entry in permissions.list(checkpoint)] == [project]
        assert other.models.retrieve(checkpoint).id == checkpoint
        assert checkpoint in [model.id for model in other.models.list()]
        with pytest.raises(openai.NotFoundError):
            other.models.retrieve(job.fine_tuned_model)
        assert permissions.delete(made.id, fine_tuned_model_checkpoint=checkpoint).deleted
        with pytest.raises(openai.NotFoundError):
            other.models.retrieve(checkpoint)


def test_names_cannot_leave_their_folder(client: openai.OpenAI, server: ServiceServer) -> None:
    before = sorted(path.name for path in server.data.parent.iterdir())
    for name in ("../x", "a/b", "..\\x", ".."):
        body = (
            f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
            f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nrow\r\n--b--\r\n'
        )
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        status, answer, _ = raw(server, "/v1/files", data=body.encode(), headers=headers)
        assert status == 400 or "/" not in json.loads(answer)["filename"], answer
    for path in ("/v1/files/..%2f..%2fserver.lock/content", "/v1/files/%2e%2e/content", "/v1/files/../../etc/passwd"):
        assert raw(server, path)[0] == 404
    assert sorted(path.name for path in server.data.parent.iterdir()) == before


def test_slow_and_false_bodies_are_given_up(server: ServiceServer) -> None:
    """A body that does not come is waited for no longer than the limit; one that was not announced is cut."""
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n"
    )
    for more, status in (("Content-Length: 1000\r\n\r\n--b", b"408"), ("Content-Length: 99999999\r\n\r\n", b"413")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sent:
            sent.sendall((head + more).encode())
            assert sent.recv(12).split()[1] == status
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sent:
        sent.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(40):  # 2.5 MiB, of which 1.2 are read at most
                sent.sendall(chunk)
        assert sent.recv(12).split()[1] in (b"413", b"400")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sent:
        sent.sendall(head.replace(ADMIN_KEY, "sk-wrong").encode() + b"Content-Length: 1000\r\n\r\n")
        assert sent.recv(12).split()[1] == b"401", "without a key no body is waited for"


def test_keys_are_hashed_and_revoked(client: openai.OpenAI, server: ServiceServer) -> None:
    project, key = new_project(client, "leavers")
    assert key.encode() not in b"".join(path.read_bytes() for path in server.data.glob("service.sqlite*"))
    with server.client(key) as made:
        made.models.list()
        listed = client.get(f"/organization/projects/{project}/api_keys", cast_to=dict)["data"]
        assert key not in json.dumps(listed)
        client.delete(f"/organization/projects/{project}/api_keys/{listed[0]['id']}", cast_to=dict)
        with pytest.raises(openai.AuthenticationError):
            made.models.list()
    actions = [entry["action"] for entry in client.get("/audit?limit=1000", cast_to=dict)["data"]]
    assert actions.count("key.revoke") == 1


def test_webhooks_are_signed_and_sent_until_they_are_taken(client: openai.OpenAI) -> None:
    taken: list[tuple[bytes, dict[str, str]]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.rfile.read(int(self.headers["content-length"])), dict(self.headers.items())))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

    hook = HTTPServer(("127.0.0.1", 0), Hook)
    Thread(target=hook.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{hook.server_port}/hook"
    made = client.post("/webhooks", body={"url": url, "events": ["fine_tuning.job.succeeded"]}, cast_to=dict)
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=upload(client)).id)
    wait_until(lambda: bool(taken))
    body, headers = taken[0]
    with openai.OpenAI(api_key="k", webhook_secret=made["secret"]) as receiver:
        event = receiver.webhooks.unwrap(body, headers)
        assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", job.id)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            receiver.webhooks.unwrap(body + b" ", headers)
    hook.shutdown()
    for bad in ("http://example.com/", "ftp://example.com/", "https://user:pw@example.com/"):
        with pytest.raises(openai.BadRequestError):
            client.post("/webhooks", body={"url": bad}, cast_to=dict)
    assert client.delete(f"/webhooks/{made['id']}", cast_to=dict)["deleted"]


def test_health_and_figures(server: ServiceServer) -> None:
    status, body, _ = raw(server, "/healthz", key=None)
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    status, body, _ = raw(server, "/metrics")
    assert status == 200
    assert b'distft_http_requests_total{method="GET",route="/healthz",status="200"}' in body
    assert raw(server, "/metrics", key=None)[0] == 401


def test_the_async_client(server: ServiceServer) -> None:
    async def drive() -> str:
        async with openai.AsyncOpenAI(api_key=ADMIN_KEY, base_url=f"{server.root}/v1", max_retries=0) as made:
            files = [made.files.create(file=("r", io.BytesIO(jsonl(CHAT))), purpose="fine-tune") for _ in range(8)]
            ids = [file.id for file in await asyncio.gather(*files)]
            jobs = await asyncio.gather(*(made.fine_tuning.jobs.create(model="tiny", training_file=i) for i in ids))
            listed = [job.id async for job in made.fine_tuning.jobs.list(limit=3)]
            assert {job.id for job in jobs} <= {*listed}
            return jobs[0].id

    server.runner.ends_at_once = True
    job_id = asyncio.run(drive())
    with server.client() as client:
        assert ended(client, job_id).status == "succeeded"


def test_jobs_outlive_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path) as first, first.client() as client:
        first.runner.ends_at_once = False
        job_id = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client)).id
        wait_until(lambda: job_id in first.runner.alive)
        first.runner.write_steps(first.folder(job_id), range(1, 3))
        folder = first.folder(job_id)
    (tmp_path / "jobs" / "ftjob-orphan").mkdir()
    first.runner.write_steps(folder, range(3, 5))  # while no server is there
    folder.write_ended(attempt=1, code=0, reason="done")
    with serving(tmp_path) as second, second.client() as client:
        assert not (tmp_path / "jobs" / "ftjob-orphan").exists()
        assert ended(client, job_id).status == "succeeded"
        assert second.runner.starts == [], "it was found, not started again"
        steps = [
            event.message[:6]
            for event in client.fine_tuning.jobs.list_events(job_id, limit=100)
            if event.type == "metrics"
        ]
        assert steps == ["Step 4", "Step 3", "Step 2", "Step 1"]
