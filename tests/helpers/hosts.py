"""Processes of `distft doctor` that live on hosts of their own: names and mounts are theirs, faults are real ones."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, environment

LIMIT_S = 170.0


@dataclass
class Rank:
    """One process, and what is different where it runs."""

    host: str
    env: dict[str, str] = field(default_factory=dict)
    before: str = "true"
    """A line of shell that is run first, in this process's own mounts."""
    absent: bool = False


@dataclass(frozen=True)
class Told:
    """What all of them left behind."""

    codes: list[int | None]
    out: list[str]
    err: list[str]

    @property
    def report(self) -> dict:
        """Rank 0's."""
        return json.loads(self.out[0].strip().splitlines()[-1])

    def findings(self, verdict: str) -> dict[str, dict]:
        """By check; the last of several."""
        return {row["check"]: row for row in self.report["findings"] if row["verdict"] == verdict}


def can_isolate() -> bool:
    """Whether this kernel lets us give a process a host name and mounts of its own."""
    return subprocess.run([*_isolated(), "true"], capture_output=True, check=False).returncode == 0


def examine(ranks: list[Rank], *arguments: str, json_: bool = True, **env: str) -> Told:
    """`distft doctor ARGUMENTS` by all ranks at once; every process is gone afterwards."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distft.doctor", *(["--json"] if json_ else []), *arguments]
    running: list[subprocess.Popen[str] | None] = []
    for number, rank in enumerate(ranks):
        place = {"RANK": number, "WORLD_SIZE": len(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        place["LOCAL_RANK"] = [r.host for r in ranks[:number]].count(rank.host)
        theirs = {name: str(value) for name, value in place.items()} if len(ranks) > 1 else {}
        script = f"hostname {rank.host} && {rank.before} && exec {shlex.join(command)}"
        started = None if rank.absent else subprocess.Popen(
            [*_isolated(), "bash", "-c", script], cwd=ROOT, env=environment(**(theirs | env | rank.env)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        running.append(started)
    said = []
    try:
        for process in running:
            said.append(("", "") if process is None else process.communicate(timeout=LIMIT_S))
    finally:
        for process in running:
            if process is not None:
                process.kill()
    codes = [None if process is None else process.returncode for process in running]
    return Told(codes, [out for out, _ in said], [err for _, err in said])


def _isolated() -> list[str]:
    flags = ["--mount", "--uts", "--kill-child=KILL", "--fork"]
    return ["unshare", *flags] if os.getuid() == 0 else ["unshare", "--map-root-user", *flags]


def other_version(folder: Path, package: str, version: str) -> str:
    """A PYTHONPATH on which `package` says that it is of another version."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return f"{folder}:{ROOT}"
