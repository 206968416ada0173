"""Checks before a process group is formed which ranks have come, through the key-value store of the group.

A group is formed by all or by none, and after its timeout says only that somebody is missing. Here every process leaves
its word in the key-value store that the group would be made from, so that those who came can be named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from distft.core.errors import MachineError

LOOK_S = 0.1
ANSWER_S = 10.0
"""A store that was reached answers at once, or is gone."""


class Rendezvous:
    """`open` it, `put` something, `wait_for` the others, and go on into a group with `store`."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self._rank = store, rank

    @classmethod
    def open(cls, rank: int, world: int, timeout_s: float, env: Mapping[str, str] = os.environ) -> Rendezvous:
        """Reach the store at MASTER_ADDR:MASTER_PORT; rank 0 makes it, except under torchrun, which has one there.

        Raises:
            MachineError: nobody answers there, or rank 0 cannot listen.
        """
        import torch.distributed as dist

        address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        torchruns = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store: Any = dist.TCPStore(  # type: ignore[reportPrivateImportUsage]
                address,
                port,
                world,
                rank == 0 and not torchruns,
                timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            listens = rank == 0 and not torchruns
            did = "cannot listen at" if listens else "waited in vain for an answer from"
            raise MachineError(f"rank {rank} {did} {address}:{port}: {str(error).splitlines()[0]}") from None
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"distft/{attempt}", store), rank)  # type: ignore[reportPrivateImportUsage]

    def announce(self, who: str) -> None:
        """Say that this rank is here.

        Raises:
            MachineError: another process says that it is this rank too.
        """
        self.put(f"who/{self._rank}/{self.store.add(f'came/{self._rank}', 1)}", who)
        if self.store.check([f"who/{self._rank}/2"]):
            both = " and ".join(self._get(f"who/{self._rank}/{number}") for number in (1, 2))
            raise MachineError(f"two processes say that they are rank {self._rank}: on {both}")

    def put(self, key: str, text: str) -> None:
        """Leave a word under `key`."""
        self.store.set(key, text)

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """Return the word under `key`; None when nobody left one in that time."""
        return self.wait_for_all([key], timeout_s).get(key)

    def wait_for_all(self, keys: Iterable[str], timeout_s: float) -> dict[str, str]:
        """Return the values of `keys`: of all, or of those that were set within the time."""
        until, values, wanted = time.monotonic() + timeout_s, dict[str, str](), list(keys)
        while wanted:
            came = [key for key in wanted if self.store.check([key])]
            values |= {key: self._get(key) for key in came}
            wanted = [key for key in wanted if key not in values]
            if time.monotonic() >= until:
                break
            if wanted:
                time.sleep(LOOK_S)
        return values

    def _get(self, key: str) -> str:
        self.store.wait([key], timedelta(seconds=ANSWER_S))
        return self.store.get(key).decode()
