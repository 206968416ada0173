"""The same API over a real PostgreSQL: started here where it is installed, and told where it is not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from service_server import ADMIN_KEY, CHAT, jsonl, serving, wait_until

pytestmark = pytest.mark.slow


def binaries() -> Path | None:
    """Folder of PostgreSQL's programs; initdb is not on the PATH of Debian."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if named := shutil.which("initdb"):
        folders.append(Path(named).parent)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    for parent in folder.parents:  # it refuses to run as root, and has to come in
        if os.getuid() == 0 and parent.stat().st_uid == 0 and parent != Path("/") and parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    data = folder / "data"
    start = [str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
    listen = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    subprocess.run([*as_user, str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "distft"], check=True,
                   capture_output=True, cwd="/")  # fmt: skip
    subprocess.run([*as_user, *start, "-o", listen, "start"], check=True, capture_output=True, cwd="/")
    try:
        yield f"postgresql+psycopg://distft@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*as_user, *start, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")


def test_jobs_over_postgres(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path, url=url) as server, server.client() as client:

        def make(number: int) -> str:
            file_id = client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune").id
            return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, metadata={"n": str(number)}).id

        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(make, range(24)))
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
        assert len(list(client.fine_tuning.jobs.list(limit=100))) == 25, "tables of an earlier server are kept"


def make_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune").id
