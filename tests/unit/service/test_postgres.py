"""The same API over a real PostgreSQL: started here where it is installed, and told where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from postgres_server import binaries, postgres
from service_server import ADMIN_KEY, CHAT, jsonl, serving, wait_until


@pytest.fixture
def url() -> Iterator[str]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres() as started:
        yield started


def test_jobs_over_postgres(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path, url=url) as server, server.client() as client:

        def make(number: int) -> str:
            file_id = client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune").id
            return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, metadata={"n": str(number)}).id

        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(make, range(12)))
        for job_id in ids:
            wait_until(lambda job_id=job_id: client.fine_tuning.jobs.retrieve(job_id).status == "succeeded")
        assert sorted(server.runner.starts) == sorted(ids), "each once"
        listed = [job.id for job in client.fine_tuning.jobs.list(limit=5)]
        assert sorted(listed) == sorted(ids)
        assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "7"})] == [ids[7]]
        messages = [event.message for event in client.fine_tuning.jobs.list_events(ids[0], limit=100)]
        assert len(messages) == len(set(messages))
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve("file-none")
        with ThreadPoolExecutor(4) as pool:  # the same key at the same time: one job
            header = {"Idempotency-Key": "same"}
            file_id = make_file(client)

            def repeat(_: int) -> str | None:
                try:
                    made = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_headers=header)
                except openai.ConflictError:
                    return None
                return made.id

            made = {job_id for job_id in pool.map(repeat, range(4)) if job_id}
        assert len(made) == 1
    with serving(tmp_path, url=url) as server, server.client() as client:
        assert len(list(client.fine_tuning.jobs.list(limit=100))) == 13, "tables of an earlier server are kept"


def make_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune").id
