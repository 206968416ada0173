"""vLLM's own server on this machine's CPU, of a Python that has vLLM: it lives in an environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 500.0


def server_command(python: str, model: Path, port: int) -> list[str]:
    """What starts it, with the model under the name `base`; flags may be added."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base"]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--block-size", "32",
            "--enforce-eager"]  # fmt: skip


def server_environment(**more: str) -> dict[str, str]:
    """Its environment: of this project's code it sees nothing, and it asks nobody outside."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return clean | {"DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"} | more


@contextmanager
def vllm_server(python: str, model: Path, log: Path, *flags: str, **env: str) -> Iterator[str]:
    """URL of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*server_command(python, model, port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=server_environment(**env))
        try:
            began = time.monotonic()
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() - began < START_S, log.read_text()[-4000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    """Whether something answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
