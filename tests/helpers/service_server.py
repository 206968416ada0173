"""A server of the fine-tuning API in this process, with a runner that trains nothing: for tests of the API itself."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn

from distft.core.files import replace_json
from distft.service import artifact_worker, auth, worker
from distft.service.app import create_app
from distft.service.database import ServiceDatabase
from distft.service.job_folder import JobFolder
from distft.service.runner import RunnerSpec, RunnerState
from distft.service.runners import RUNNERS
from distft.service.settings import ServedBase, ServiceLimits, ServiceSettings

ADMIN_KEY = "sk-distft-test-admin-key"
_EXAMINE = """
import json, os, sys
folder = sys.argv[1]
request = json.load(open(os.path.join(folder, "request.json")))
if os.environ.get("EXAMINE_WAITS"):
    import time
    time.sleep(60)
rows = open(os.path.join(folder, "train.jsonl")).read()
if "killed" in rows:
    with open(os.path.join(folder, "tries"), "a") as tries:
        tries.write("x")
    if "always" in rows or os.path.getsize(os.path.join(folder, "tries")) < 3:
        os.kill(os.getpid(), 9)
kind = request["method"]["type"]
values = {key: 1 if value == "auto" else value for key, value in request["method"][kind]["hyperparameters"].items()}
found = {"hyperparameters": values, "num_steps": 4, "events": [{"message": "4 rows", "level": "info", "data": None}]}
if "broken" in rows:
    found = {"error": {"code": "invalid_training_file", "message": "row 1 is broken", "param": "training_file"}}
if "too large" in rows:
    found = {"events": found["events"], "error": {"code": "does_not_fit", "message": "lower it", "param": None}}
open(os.path.join(folder, "recipe.toml"), "w").write('name = "job"\\n')
path = os.path.join(folder, "examined.json")
json.dump(found, open(path + ".new", "w"))
os.replace(path + ".new", path)
"""


_MAKE = """
import json, os, sys, time
folder = sys.argv[1]
request = json.load(open(os.path.join(folder, "request.json")))
run = request["sources"][0]["run"]
def said(name):
    path = os.path.join(run, name)
    return open(path).read() if os.path.exists(path) else ""
with open(os.path.join(run, "tries"), "a") as tries:
    tries.write("x")
plan = said("plan")
if plan == "killed" and len(said("tries")) < 3 or plan == "always killed":
    os.kill(os.getpid(), 9)
content = os.path.join(folder, "content")
os.makedirs(os.path.join(content, "below"))
open(os.path.join(content, "model.bin"), "wb").write(bytes(range(256)) * 50)
while plan == "waits" and not said("go"):
    time.sleep(0.02)
open(os.path.join(content, "below", "u" * 90 + "\u00fc" * 60), "w").write("deep")
open(os.path.join(content, "empty"), "w").close()
if plan == "links":
    os.symlink("/etc/passwd", os.path.join(content, "link"))
check = {"name": "kl", "compared": "<b>both</b>", "count": 3, "value": 1e-5, "bound": "1e-3", "ok": True, "detail": ""}
level = {"level": request["settings"].get("level") or "", "runtime": "llama.cpp 1", "unproven": "", "checks": [check]}
proof = {
    "export": {"proven": True, "rows": {"prompts": 20, "from": "built-in prompts"}, "levels": [level]},
    "merge": {"comparison": {"kl": 1e-7, "largest_kl": 1e-6, "agreement": 1.0, "num_tokens": 900, "num_rows": 8},
              "max_kl": 1e-6},
    "combine": {"rank": 8, "relative_error": 0.25, "tensors": 14},
}[request["kind"]]
made = {"proof": proof}
if plan == "refuses":
    made = {"error": {"code": "cannot_be_made", "message": "no <i>room</i>", "param": None}}
path = os.path.join(folder, "made.json")
json.dump(made, open(path + ".new", "w"))
os.replace(path + ".new", path)
"""


class ScriptedRunner:
    """Writes what a run would: `steps` steps at each start, then it waits to be told its end, or ends at once."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.states: dict[str, RunnerState] = {}
        self.starts: list[str] = []
        self.ends_at_once = True
        self.most_alive = 0

    def start(self, folder: JobFolder, base: ServedBase, attempt: int) -> str | None:
        (folder.path / "ended.json").unlink(missing_ok=True)
        folder.run.mkdir(parents=True, exist_ok=True)
        replace_json(folder.run / "manifest.json", {"num_steps": 4})
        self.alive.add(folder.job_id)
        self.most_alive = max(self.most_alive, len(self.alive))
        self.starts.append(folder.job_id)  # last: a test that sees it may write into the folder, and end the run
        if self.ends_at_once:
            self.write_steps(folder, range(1, 5))
            self.end(folder)
        return None

    def is_alive(self, folder: JobFolder, name: str | None) -> bool:
        return folder.job_id in self.alive

    def state(self, folder: JobFolder, name: str | None) -> RunnerState | None:
        return self.states.get(folder.job_id)

    def release(self, folder: JobFolder, name: str | None) -> None:
        """It stays as it is."""

    def kill(self, folder: JobFolder, name: str | None) -> None:
        self.alive.discard(folder.job_id)

    def write_steps(self, folder: JobFolder, steps: range) -> None:
        with (folder.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for step in steps:
                record = {"step": step, "loss": 1.0 / step, "lr": 0.1, "tokens": 10 * step, "step_s": 0.1}
                file.write(json.dumps(record) + "\n")
        for step in steps:
            point = folder.run / "checkpoints" / f"step-{step:08d}"
            point.mkdir(parents=True, exist_ok=True)
            (point / "MANIFEST.json").write_text("{}", encoding="utf-8")

    def end_all(self, jobs: Path) -> None:
        """End what a test left alive, and let what starts from now on end by itself."""
        self.ends_at_once = True
        for job_id in sorted(self.alive):
            self.end(JobFolder(path=jobs / job_id))

    def end(self, folder: JobFolder, *, code: int | None = 0, reason: str = "done") -> None:
        """End a run; code None: it vanishes without a word."""
        if code is not None:
            folder.write_ended(attempt=1, code=code, reason=reason)
        self.alive.discard(folder.job_id)


_RUNNER: list[ScriptedRunner] = []
RUNNERS.add(RunnerSpec(name="scripted", build=lambda settings: _RUNNER[-1]))


class ServiceServer:
    """A server in a thread of this process."""

    def __init__(self, data: Path, *, url: str | None = None, **limits: Any) -> None:
        worker.LOOKS_S = artifact_worker.LOOKS_S = 0.03  # jobs of these tests take no longer
        self.data, self.runner = data, ScriptedRunner()
        _RUNNER.append(self.runner)
        base = ServedBase(path="demo:tiny-llama", methods=("supervised", "dpo", "reinforcement"))
        limits = {"jobs_side_by_side": 4, **limits}
        self.settings = ServiceSettings(
            data=data, models={"tiny": base, "chat-only": ServedBase(path="demo:tiny-llama", methods=("supervised",))},
            limits=ServiceLimits(**limits), runner="scripted", examine=(sys.executable, "-c", _EXAMINE),
            make_artifact=(sys.executable, "-c", _MAKE),
        )  # fmt: skip
        data.mkdir(parents=True, exist_ok=True)
        self.database = ServiceDatabase(url or f"sqlite:///{data / 'service.sqlite'}")
        self.database.migrate()
        auth.first_key(self.database)
        self.app = create_app(self.settings, self.database)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def client(self, key: str = ADMIN_KEY) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{self.root}/v1", max_retries=0, timeout=60)

    def folder(self, job_id: str) -> JobFolder:
        return JobFolder(path=self.settings.jobs / job_id)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._listening.close()


@contextmanager
def serving(data: Path, **options: Any) -> Iterator[ServiceServer]:
    """A server for the length of the context."""
    server = ServiceServer(data, **options)
    try:
        yield server
    finally:
        server.stop()


def wait_until(holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until something holds, and fail when it does not within a minute."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.02)


def jsonl(*rows: Any) -> bytes:
    """Rows as a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
