"""Fake ranks: threads that meet at a barrier, and a fault hook that raises instead of killing."""

import copy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from distft.checkpoint.intervals import Piece
from distft.checkpoint.store import CheckpointStore


class Killed(BaseException):
    """What SIGKILL is to a process: nothing of ours may catch it."""


class Ranks:
    """Meeting point of `world` threads."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.slots: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)


class ThreadGroup:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.world = ranks, rank, ranks.world

    def gather(self, value: Any) -> list[Any]:
        self.ranks.slots[self.rank] = value
        self.barrier()
        found = [copy.deepcopy(slot) for slot in self.ranks.slots]
        self.barrier()
        return found

    def gather_to_rank0(self, value: Any) -> list[Any]:
        found = self.gather(value)
        return found if self.rank == 0 else []

    def all_true(self, yes: bool) -> bool:
        return all(self.gather(yes))

    def barrier(self) -> None:
        try:
            self.ranks.barrier.wait()
        except threading.BrokenBarrierError:
            raise Killed("a peer is gone") from None  # the launcher kills the others


def on_ranks(world: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """`work` on every rank at once; the results by rank. The first error is raised, kills last."""
    ranks = Ranks(world)
    results: list[Any] = [None] * world
    errors: list[BaseException | None] = [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(ranks, rank))
        except BaseException as error:
            errors[rank] = error
            ranks.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    raised = sorted((error for error in errors if error is not None), key=lambda error: isinstance(error, Killed))
    if raised:
        raise raised[0]
    return results


class Hook:
    """Raises `error` at one point, optionally of one rank and step."""

    def __init__(
        self, point: str, error: Callable[[], BaseException], rank: int | None = None, step: int | None = None
    ) -> None:
        self.point, self.error, self.rank, self.step = point, error, rank, step
        self.seen: list[str] = []

    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        self.seen.append(point)
        if point == self.point and self.rank in (None, rank) and self.step in (None, step):
            raise self.error()


class Quiet:
    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        pass


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Whole tensors that depend on the step: odd sizes, three dtypes, an empty one."""
    seed = torch.Generator().manual_seed(step)
    return {
        "param/a.weight": torch.randn(1001, generator=seed),
        "exp_avg/a.weight": torch.randn(1001, generator=seed).to(torch.bfloat16),
        "state1/b.weight": torch.randint(0, 255, (517,), generator=seed, dtype=torch.uint8),
        "param/empty": torch.zeros(0),
    }


def sliced(whole: dict[str, torch.Tensor], rank: int, world: int, shift: int = 0) -> list[Piece]:
    """A rank's slice of every tensor; `shift` moves the borders so that they are not even."""
    pieces = []
    for name, tensor in whole.items():
        count = tensor.numel()
        borders = [0, *(min(count, count * r // world + shift) for r in range(1, world)), count]
        start, stop = borders[rank], borders[rank + 1]
        pieces.append(Piece(name, start, count, tensor[start:stop]))
    return pieces


def save(store: CheckpointStore, group: Any, step: int, **more: Any) -> Any:
    pieces = sliced(tensors(step), group.rank, group.world)
    return store.save(pieces, {"step": step, "seen": [1, 2]}, step=step, **more)


def same(loaded: Any, step: int) -> bool:
    """Whether a loaded checkpoint holds the tensors of a step, bit for bit."""
    want = tensors(step)
    got = {name: loaded.reader.read(name) for name in loaded.reader}
    return (
        loaded.state["step"] == step and want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    )


def filled(folder: Path, *steps: int, world: int = 2, **more: Any) -> None:
    """A folder with these checkpoints."""

    def work(group: ThreadGroup) -> None:
        store = CheckpointStore(folder, group, faults=Quiet(), **more)
        for step in steps:
            save(store, group, step)

    on_ranks(world, work)


def newest(folder: Path, world: int = 2) -> Any:
    return on_ranks(world, lambda group: CheckpointStore(folder, group, faults=Quiet()).load_newest())[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    return sys.modules[__name__]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.checkpoint.loading.SHARED_WAIT_S", 0.01)
