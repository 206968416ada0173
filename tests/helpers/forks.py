"""Starts of the main job without its imports: one process imports everything, then forks the ranks of each start.

As under srun: real processes, real signals, and nobody who ends the other ranks when one dies. A start takes a second
or two instead of ten, so that a run can be killed at every point there is.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from harness import Job

WORLD = 2
LIMIT_S = 120.0
"""A start that takes longer hangs."""


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

    def start(self, job: Job, *, fault: str = "", limit_s: float = LIMIT_S) -> None:
        """Start it; `codes` waits for its end."""
        assert self._parent.stdin is not None
        self._before = self._output.stat().st_size
        print(
            json.dumps({"arguments": job.arguments, "fault": fault, "limit_s": limit_s}),
            file=self._parent.stdin,
            flush=True,
        )

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
        return self._output.read_text(errors="replace")[self._before :]

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._parent.communicate()  # no more starts: it ends


def main() -> None:
    """Read starts, a JSON object a line, and print the exit codes of each."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import distft.assemble
    import distft.job  # noqa: F401

    for line in sys.stdin:
        start = json.loads(line)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        ranks = [fork(rank, port, start["arguments"], start["fault"]) for rank in range(WORLD)]
        print(json.dumps(codes_of(ranks, start["limit_s"])), flush=True)


def fork(rank: int, port: int, arguments: list[str], fault: str) -> int:
    """The number of a process that is this rank."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdin.close()
    os.dup2(2, 1)
    place = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "DISTFT_FAULT": fault}
    become(arguments)


def become(arguments: list[str]) -> NoReturn:
    """As `python -m distft.train` goes on once it has imported everything."""
    from distft.core.leave import leave
    from distft.job import main

    code = 1
    try:
        code = main(arguments)
    finally:
        leave(code)


def codes_of(ranks: list[int], limit_s: float) -> list[int | None]:
    """Exit codes, None for a process that had to be killed from here."""
    codes: dict[int, int | None] = {}
    until = time.monotonic() + limit_s
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    main()
