"""Processes of `distft doctor` or of a run on hosts of their own: names, mounts, networks are theirs, faults real."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from harness import ROOT, Job, Launch, environment, until

LIMIT_S = 170.0


@dataclass
class Rank:
    """One process, and what is different where it runs."""

    host: str
    env: dict[str, str] = field(default_factory=dict)
    before: str = "true"
    """A line of shell that is run first, in this process's own mounts."""
    absent: bool = False
    network: tuple[str, ...] = ()
    """Words in front of its command line that put it into a network of its own."""

    def command(self, *words: str) -> list[str]:
        """A command line, there."""
        script = f"hostname {self.host} && {self.before} && exec {shlex.join(words)}"
        return [*self.network, *_isolated(), "bash", "-c", script]


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
        place = {"RANK": number, "WORLD_SIZE": len(ranks), "MASTER_ADDR": Wire.FIRST if rank.network else "localhost"}
        place |= {"MASTER_PORT": port}
        place["LOCAL_RANK"] = [r.host for r in ranks[:number]].count(rank.host)
        theirs = {name: str(value) for name, value in place.items()} if len(ranks) > 1 else {}
        around = environment(**(theirs | env | rank.env))
        started = None if rank.absent else subprocess.Popen(
            rank.command(*command), cwd=ROOT, env=around, text=True,
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


class Wire:
    """`with Wire() as wire:` two hosts' networks, and the one cable between them; needs to be root."""

    FIRST, SECOND, CARD = "10.177.0.1", "10.177.0.2", "net0"

    def __enter__(self) -> Wire:
        self._hosts = [f"distft-{os.getpid()}-{number}" for number in range(2)]
        for host in self._hosts:
            self._ip("netns", "add", host)
            self._ip("-n", host, "link", "set", "lo", "up")
        first, second = self._hosts
        self._ip("-n", first, "link", "add", self.CARD, "type", "veth", "peer", "name", self.CARD, "netns", second)
        for host, address in zip(self._hosts, (self.FIRST, self.SECOND), strict=True):
            self._ip("-n", host, "address", "add", f"{address}/24", "dev", self.CARD)
            self._ip("-n", host, "link", "set", self.CARD, "up")
        until(lambda: all(self._is_up(host) for host in self._hosts), 10)  # the kernel tells with some delay
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for host in self._hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False)

    def ranks(self) -> list[Rank]:
        """A process at each end."""
        return [
            Rank(f"node{number}", env={"GLOO_SOCKET_IFNAME": self.CARD}, network=("ip", "netns", "exec", host))
            for number, host in enumerate(self._hosts, start=1)
        ]

    def slow(self, rate: str) -> None:
        """As `tc` says it: "200mbit"; both ways."""
        for host in self._hosts:
            shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
            subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", self.CARD, *shape], check=True)

    def free(self) -> None:
        """As fast as it was before `slow`."""
        for host in self._hosts:
            subprocess.run(["tc", "-n", host, "qdisc", "delete", "dev", self.CARD, "root"], check=True)

    def cut(self) -> None:
        """Nothing arrives any more, and both ends still think they have a cable: all is sent to a card that is not."""
        for host, other in zip(self._hosts, (self.SECOND, self.FIRST), strict=True):
            nobody = ["lladdr", "02:00:00:00:00:99", "nud", "permanent"]
            self._ip("-n", host, "neighbour", "replace", other, "dev", self.CARD, *nobody)

    def heal(self) -> None:
        """What is sent again arrives, after `cut`."""
        for host, other in zip(self._hosts, (self.SECOND, self.FIRST), strict=True):
            self._ip("-n", host, "neighbour", "delete", other, "dev", self.CARD)

    @contextlib.contextmanager
    def launched(self, job: Job, *, fault: str = "") -> Iterator[list[Launch]]:
        """The job by one torchrun at each end, one process each, as two nodes without a scheduler start it."""
        with socket.create_server(("localhost", 0)) as some:
            port = str(some.getsockname()[1])
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    Launch(
                        rank.command(
                            *(
                                sys.executable,
                                "-m",
                                "torch.distributed.run",
                                "--nnodes",
                                "2",
                                "--node-rank",
                                str(number),
                            ),
                            *("--nproc-per-node", "1", "--master-addr", self.FIRST, "--master-port", port),
                            *("-m", "distft.train", *job.arguments),
                        ),
                        **rank.env,
                        DISTFT_FAULT=fault,
                    )
                )
                for number, rank in enumerate(self.ranks())
            ]

    def _is_up(self, host: str) -> bool:
        state = ["ip", "netns", "exec", host, "cat", f"/sys/class/net/{self.CARD}/operstate"]
        return subprocess.run(state, capture_output=True, text=True, check=True).stdout.strip() == "up"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


def can_wire() -> bool:
    """Whether we may make networks here, and programs for that are installed."""
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        return False
    name = f"distft-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made


def _isolated() -> list[str]:
    flags = ["--mount", "--uts", "--kill-child=KILL", "--fork"]
    return ["unshare", *flags] if os.getuid() == 0 else ["unshare", "--map-root-user", *flags]


def other_version(folder: Path, package: str, version: str) -> str:
    """A PYTHONPATH on which `package` says that it is of another version."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return f"{folder}:{ROOT}"
