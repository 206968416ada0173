"""A server of the fine-tuning API as a process, started with `distft serve`, and killed where a test wants that."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

KEY = "sk-distft-process-key"


class ServiceProcess:
    """`distft serve` with a data folder of its own."""

    def __init__(self, data: Path, *arguments: str, key: str | None = KEY) -> None:
        self.data, self._arguments, self._key = data, arguments, key
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "distft.serve", "--port", "0", "--data", str(self.data), *self._arguments]
        env = {name: value for name, value in os.environ.items() if name != "DISTFT_API_KEY"}
        env |= {"DISTFT_API_KEY": self._key} if self._key else {}
        log = self.data.with_name(f"{self.data.name}.log").open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        assert self.process.stdout is not None
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line.strip())
            if match := re.fullmatch(r"listening on (http://\S+)\n", line):
                self.url = match[1]
                return
        raise AssertionError(f"it did not start: {self.log}")

    @property
    def log(self) -> str:
        return self.data.with_name(f"{self.data.name}.log").read_text(encoding="utf-8")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key=self._key, base_url=f"{self.url}/v1", max_retries=2, timeout=120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(timeout=60)
        return code

    def end_jobs(self) -> None:
        """Kill the processes of jobs that a test has left."""
        for path in self.data.glob("jobs/*/process.json"):
            try:
                os.killpg(json.loads(path.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
            except (ProcessLookupError, ValueError, PermissionError):
                continue


@contextmanager
def service(data: Path, *arguments: str, key: str | None = KEY) -> Iterator[ServiceProcess]:
    """A server for the length of the context; its jobs end with it."""
    running = ServiceProcess(data, *arguments, key=key)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.kill()
        running.end_jobs()
