"""Load on `distft serve`: 50 clients, 1,000 files, 200 jobs that wait behind one that runs, 10,000 reads by the clock.

`python benchmarks/service_load.py --out FILE [--database postgresql+psycopg://...]`. Clients and server share the
machine. Reads are sent by the clock, whether earlier ones were answered or not, and are timed from the moment at which
they were due, so that a server that stands still is seen. Files of waiting jobs are looked at by a stand-in, which
takes no time of the measurement; the one that runs is a real job.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
from kit import finish

KEY = "sk-distft-benchmark-key"
CLIENTS, FILES, JOBS = 50, 1000, 200
EXAMINE = """
import json, os, sys
folder = sys.argv[1]
if b"runs long" in open(os.path.join(folder, "train.jsonl"), "rb").read():
    os.execv(sys.executable, [sys.executable, "-m", "distft.service.examine", folder])
found = {"hyperparameters": {"n_epochs": 1}, "num_steps": 1, "events": []}
with open(os.path.join(folder, "examined.new"), "w") as file:
    json.dump(found, file)
os.replace(os.path.join(folder, "examined.new"), os.path.join(folder, "examined.json"))
"""
MODEL = {
    "path": "demo:tiny-llama",
    "chat_template": "plain",
    "recipe": {"model": {"init": "random", "dtype": "float32"}, "method": {"name": "full"}},
}


def serve(data: Path, database: str | None, niceness: int | None) -> None:
    """Serve as `distft serve` does, but for what looks at files."""
    from distft.service.app import create_app
    from distft.service.auth import first_key
    from distft.service.database import ServiceDatabase
    from distft.service.http_server import HttpServer, listen
    from distft.service.logs import log_as_json
    from distft.service.settings import ServedBase, ServiceSettings, SettingsFile

    limits = {} if niceness is None else {"niceness": niceness}
    content = SettingsFile.model_validate({"models": {"tiny": MODEL}, "limits": limits})
    assert isinstance(content.models["tiny"], ServedBase)
    settings = ServiceSettings(
        data=data, models=content.models, limits=content.limits, examine=(sys.executable, "-S", "-c", EXAMINE)
    )
    rows = ServiceDatabase(database or f"sqlite:///{data / 'service.sqlite'}")
    rows.migrate()
    first_key(rows)
    log_as_json()

    listening = listen("127.0.0.1", 0)
    app = create_app(settings, rows)
    HttpServer(app, when_listening=lambda: print(f"listening on {listening.getsockname()[1]}", flush=True)).run(
        sockets=[listening]
    )


def row(text: str) -> bytes:
    """A row of a file."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return (json.dumps({"messages": messages}) + "\n").encode()


def rss_mib(pid: int) -> float:
    """Memory of a process that is not its pages of files."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has taken, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stolen_s() -> float:
    """Seconds of CPU that the machine below this one has given to others, on all cores."""
    return int(Path("/proc/stat").read_text(encoding="utf-8").split()[8]) / os.sysconf("SC_CLK_TCK")


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(value * 1000 for value in values)
    cuts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * cut))], 1) for name, cut in cuts.items()}


class Load:
    """Clients of one server."""

    def __init__(self, url: str, pid: int) -> None:
        self._pid = pid
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        self._http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {KEY}"}, limits=limits, timeout=120
        )
        self.files: dict[str, bytes] = {}
        self.jobs: list[str] = []
        self.statuses: Counter[int] = Counter()

    async def upload(self, content: bytes) -> tuple[str, float]:
        began = time.perf_counter()
        told = await self._http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)}
        )
        took = time.perf_counter() - began
        self.statuses[told.status_code] += 1
        assert told.status_code == 200, told.text
        self.files[told.json()["id"]] = content
        return told.json()["id"], took

    async def create(self, file_id: str, **hyperparameters: int) -> float:
        began = time.perf_counter()
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        body = {"model": "tiny", "training_file": file_id, "method": method}
        told = await self._http.post("/v1/fine_tuning/jobs", json=body)
        self.statuses[told.status_code] += 1
        assert told.status_code == 200, told.text
        self.jobs.append(told.json()["id"])
        return time.perf_counter() - began

    async def by_clients(self, works: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """Do pieces of work, as many at a time as there are clients."""
        waiting = iter(works)

        async def client() -> list[Any]:
            return [await work() for work in waiting]

        return list(itertools.chain(*await asyncio.gather(*(client() for _ in range(CLIENTS)))))

    async def get(self, path: str) -> Any:
        told = await self._http.get(path)
        self.statuses[told.status_code] += 1
        return told.json() if "content" not in path else told.content

    async def whole(self, path: str, limit: int) -> list[str]:
        """Return every id of a list, page by page."""
        ids: list[str] = []
        after = ""
        while True:
            page = await self.get(f"{path}limit={limit}{after}")
            ids += [entry["id"] for entry in page["data"]]
            if not page["has_more"]:
                return ids
            after = f"&after={ids[-1]}"

    async def reads(self, rate: float, count: int) -> dict[str, Any]:
        """Send reads by the clock; return how long they took by kind, and the server's memory meanwhile."""
        chance = random.Random(1)
        kinds: dict[str, Callable[[], str]] = {
            "job": lambda: f"/v1/fine_tuning/jobs/{chance.choice(self.jobs)}",
            "jobs": lambda: "/v1/fine_tuning/jobs?limit=20",
            "events": lambda: f"/v1/fine_tuning/jobs/{chance.choice(self.jobs)}/events?limit=20",
            "checkpoints": lambda: f"/v1/fine_tuning/jobs/{self.jobs[0]}/checkpoints",
            "file": lambda: f"/v1/files/{chance.choice(list(self.files))}",
            "files": lambda: "/v1/files?limit=100",
            "models": lambda: "/v1/models",
        }
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        memory: list[float] = []
        running: set[asyncio.Task[None]] = set()

        late: list[float] = []
        tenths: list[list[float]] = [[] for _ in range(10)]

        async def one(kind: str, due: float, number: int) -> None:
            late.append(time.perf_counter() - due)
            await self.get(kinds[kind]())
            took[kind].append(time.perf_counter() - due)
            tenths[number * 10 // count].append(took[kind][-1])

        began, worked, sent, stolen = time.perf_counter(), cpu_s(self._pid), time.process_time(), stolen_s()
        for number in range(count):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if number % (count // 10) == 0:
                memory.append(round(rss_mib(self._pid), 1))
            task = asyncio.create_task(one(chance.choice(list(kinds)), due, number))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        memory.append(round(rss_mib(self._pid), 1))
        whole = time.perf_counter() - began
        return {
            "requests_s": round(count / whole, 1),
            "server_cpu_ms_per_request": round((cpu_s(self._pid) - worked) / count * 1000, 2),
            "client_cpu_ms_per_request": round((time.process_time() - sent) / count * 1000, 2),
            "client_was_late_ms": percentiles(late),
            "stolen_s": round(stolen_s() - stolen, 2),
            "ms": percentiles(list(itertools.chain(*took.values()))),
            "p99_ms_by_tenth": [percentiles(values)["p99"] for values in tenths],
            "ms_by_kind": {kind: percentiles(values) for kind, values in took.items()},
            "memory_mib": memory,
        }

    async def measure(self, rate: float, count: int) -> dict[str, Any]:
        running_file, _ = await self.upload(b"".join(row(f"this one runs long: {number}") for number in range(4000)))
        await self.create(running_file, n_epochs=50, batch_size=4)
        while (job := await self.get(f"/v1/fine_tuning/jobs/{self.jobs[0]}"))["status"] != "running":
            assert job["status"] != "failed", job
            await asyncio.sleep(0.5)
        uploads = await self.by_clients(
            [lambda number=number: self.upload(row(f"file {number}")) for number in range(FILES)]
        )
        creations = await self.by_clients(
            [lambda file_id=file_id: self.create(file_id) for file_id, _ in uploads[:JOBS]]
        )
        queued: list[Any] = []
        while len(queued) < JOBS:
            listed = await self.get("/v1/fine_tuning/jobs?limit=100")
            more = await self.get(f"/v1/fine_tuning/jobs?limit=100&after={listed['data'][-1]['id']}")
            queued = [job for page in (listed, more) for job in page["data"] if job["status"] == "queued"]
            await asyncio.sleep(1)
        result = await self.reads(rate, count)
        step = (await self.get(f"/v1/fine_tuning/jobs/{self.jobs[0]}/events?limit=1"))["data"][0]
        files, jobs = await self.whole("/v1/files?", 300), await self.whole("/v1/fine_tuning/jobs?", 50)
        lost = [file_id for file_id in self.files if file_id not in files]
        lost += [job_id for job_id in self.jobs if job_id not in jobs]
        for file_id, content in list(self.files.items())[::50]:
            told = await self.get(f"/v1/files/{file_id}/content")
            if hashlib.sha256(told).digest() != hashlib.sha256(content).digest():
                lost.append(file_id)
        await self._http.aclose()
        return {
            "lost_writes": len(lost) + len(files) - len(self.files) + len(jobs) - len(self.jobs),
            "statuses": dict(self.statuses),
            "uploads_ms": percentiles([took for _, took in uploads]),
            "creations_ms": percentiles(creations),
            "reads": result,
            "running_meanwhile": step["message"],
            "load_average": os.getloadavg(),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="as of distft serve; SQLite unless given")
    parser.add_argument("--niceness", type=int, help="of jobs, as in [limits] of distft serve")
    parser.add_argument("--rate", type=float, default=100.0, help="reads a second")
    parser.add_argument("--requests", type=int, default=10_000, help="reads in all")
    parser.add_argument("--out")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.database, options.niceness)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        command = [sys.executable, __file__, "--serve", str(data)]
        command += ["--database", options.database] if options.database else []
        command += [] if options.niceness is None else ["--niceness", str(options.niceness)]
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"DISTFT_API_KEY": KEY}
            )
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split()[-1]
            result = asyncio.run(Load(f"http://127.0.0.1:{port}", server.pid).measure(options.rate, options.requests))
        finally:
            server.kill()
            server.wait()
            for path in data.glob("jobs/*/process.json"):
                os.killpg(json.loads(path.read_text(encoding="utf-8"))["pid"], 9)
    result |= {"database": (options.database or "sqlite").partition(":")[0], "clients": CLIENTS, "rate": options.rate}
    finish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
