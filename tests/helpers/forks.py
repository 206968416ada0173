"""Starts of ranks without their imports: one process imports everything, then forks the ranks of each start.

As under srun: real processes, real signals, and nobody who ends the other ranks when one dies. A start takes a second
or two instead of ten, so that a run can be killed at every point there is.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from harness import Job

WORLD = 2
LIMIT_S = 120.0
"""A start that takes longer hangs."""
LIBRARIES = (
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "rich.progress",
    "setuptools",  # what compiles and loads DeepSpeed's operators asks for it
    "torch.utils.cpp_extension",
    "transformers.models.llama.modeling_llama",
)
"""What ranks import late."""
SERVICE = "distft.service"
"""No rank imports it, and scripts of its migrations are not modules."""


class Forks:
    """`with Forks(folder) as forks: forks.run(job, fault="kill:rank=1,point=P3")`; the output goes to `folder`."""

    def __init__(self, folder: Path) -> None:
        from harness import ROOT, environment

        self._output = folder / "forks.txt"
        with self._output.open("w") as output:
            self._parent = subprocess.Popen(
                [sys.executable, __file__], cwd=ROOT, env=environment(DS_ACCELERATOR="cpu"), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip
        self._before = 0

    def start(self, job: Job, *, fault: str = "", limit_s: float = LIMIT_S) -> None:
        """Start it; `codes` waits for its end."""
        self._start({"arguments": job.arguments, "env": {"DISTFT_FAULT": fault}, "limit_s": limit_s, "world": WORLD})

    def script(self, world: int, command: list[str], *, limit_s: float, env: dict[str, str]) -> list[int]:
        """Run a Python file and its arguments on `world` ranks, as torchrun would; see `codes`."""
        self._start({"command": command, "env": env, "limit_s": limit_s, "world": world})
        return self.codes()

    def _start(self, start: dict[str, object]) -> None:
        assert self._parent.stdin is not None
        self._before = self._output.stat().st_size
        print(json.dumps(start), file=self._parent.stdin, flush=True)

    def run(self, job: Job, *, fault: str = "", limit_s: float = LIMIT_S) -> list[int]:
        """Start it and wait for its end; see `codes`."""
        self.start(job, fault=fault, limit_s=limit_s)
        return self.codes()

    def codes(self) -> list[int]:
        """Exit codes by rank, -9 for one that was killed.

        Raises:
            AssertionError: a rank did not end.
        """
        assert self._parent.stdout is not None
        codes = json.loads(self._parent.stdout.readline() or "null")
        assert codes is not None, self.stderr()
        assert None not in codes, f"a rank hangs: {codes}\n{self.stderr()}"
        return codes

    def stderr(self) -> str:
        """What the last start has printed."""
        return self._output.read_bytes()[self._before :].decode(errors="replace")

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._parent.communicate()  # no more starts: it ends


@functools.cache
def shared() -> Forks:
    """The one of this test process; it ends when its input is closed, which is when this process ends."""
    return Forks(Path(tempfile.mkdtemp(prefix="forks-")))


def main() -> None:
    """Read starts, a JSON object a line, and print the exit codes of each."""
    import_all()
    for line in sys.stdin:
        start = json.loads(line)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        ranks = [fork(rank, port, start) for rank in range(start["world"])]
        print(json.dumps(codes_of(ranks, start["limit_s"], together="command" in start)), flush=True)


def import_all() -> None:
    """Import what ranks import, and let their garbage collectors pass over it: each would look at it again."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import distft
    from distft.cli import VERBS

    own = {module.name for module in pkgutil.walk_packages(distft.__path__, "distft.")}
    own = {name for name in own if not name.startswith(SERVICE)}
    commands = {f"distft.{verb}" for verb in VERBS} | {name for name in own if name.endswith("__main__")}
    for name in (*LIBRARIES, *sorted(own - commands)):
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("llama")  # compiles the patterns of every architecture, and keeps them
    assert "torch._inductor.async_compile" not in sys.modules, "a rank that compiles would wait for the parent's pool"
    gc.collect()
    gc.freeze()


def fork(rank: int, port: int, start: dict) -> int:
    """The number of a process that is this rank."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdin.close()
    os.dup2(2, 1)
    world = start["world"]
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | start["env"]
    if "command" in start:
        become_script(start["command"])
    become(start["arguments"])


def become_script(command: list[str]) -> NoReturn:
    """As `python FILE ARGUMENTS` goes on once it has imported everything."""
    from distft.core.hard_exit import hard_exit

    code = 1
    try:
        sys.argv = command
        sys.path[:0] = [str(Path(command[0]).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        hard_exit(code)


def become(arguments: list[str]) -> NoReturn:
    """As `python -m distft.train` goes on once it has imported everything."""
    from distft.core.hard_exit import hard_exit
    from distft.job import main

    code = 1
    try:
        code = main(arguments)
    finally:
        hard_exit(code)


def codes_of(ranks: list[int], limit_s: float, *, together: bool = False) -> list[int | None]:
    """Exit codes, None for a process that had to be killed from here; `together`: soon after another has failed."""
    codes: dict[int, int | None] = {}
    until = time.monotonic() + limit_s
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if together and codes[pid]:
                    until = min(until, time.monotonic() + 30)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    main()
