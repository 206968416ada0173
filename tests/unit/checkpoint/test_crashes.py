"""Errors and kills at every named point of a save: an old or the new checkpoint is valid, never neither."""

import errno
from pathlib import Path

import pytest
from one_rank import OneRank

from distft.checkpoint.commit import SaveFailed
from distft.checkpoint.store import CheckpointStore
from distft.core.faults import InjectedFault

POINTS = [f"P{number}" for number in range(10)]


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.row(9, 10)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("error", [full, lambda: InjectedFault("injected")], ids=["enospc", "raise"])
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_an_error_costs_one_save_at_most(kit, tmp_path: Path, point: str, rank: int, error, background: bool) -> None:
    hooks = [kit.Hook(point, error, rank=rank, step=4) for _ in range(3)]

    def work(group):
        store = CheckpointStore(tmp_path, group, faults=hooks[group.rank])
        kit.save(store, group, 2)
        try:
            if background:
                store.save_async(kit.sliced(kit.tensors(4), group.rank, 3), {"step": 4}, step=4)
                outcome = store.finish()
            else:
                outcome = kit.save(store, group, 4)
        except SaveFailed as failed:
            outcome = failed
        assert not [name for name in kit.names(tmp_path) if name.startswith(".")]
        failures = store.failures_in_a_row
        group.barrier()  # all have looked
        assert kit.save(store, group, 6).step == 6
        assert store.failures_in_a_row == 0
        return outcome, failures

    outcomes = kit.on_ranks(3, work)
    lost = point in POINTS[:5] or (rank == 0 and point in ("P5", "P6"))
    for outcome, failures in outcomes:
        assert isinstance(outcome, SaveFailed) == lost
        assert failures == int(lost)
        assert not lost or f"rank {rank}: " in str(outcome)
        if lost and error is full and point not in ("P0", "P1", "P4"):
            assert "disk full: need" in str(outcome)
    if not lost and point != "P9":
        assert f"rank {rank}: " in outcomes[0][0].warnings[0]
    assert {"P0", "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"} == set(hooks[1].seen)
    assert kit.same(kit.newest(tmp_path, world=3), 6)


@pytest.mark.row(2)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_kill_leaves_the_old_or_the_new(kit, tmp_path: Path, point: str, rank: int, background: bool) -> None:
    def work(group) -> None:
        store = CheckpointStore(tmp_path, group, faults=kit.Hook(point, kit.Killed, rank=rank, step=4))
        kit.save(store, group, 2)
        if background:
            store.save_async(kit.sliced(kit.tensors(4), group.rank, 2), {"step": 4}, step=4)
            store.finish()
        else:
            kit.save(store, group, 4)

    if point == "P9" and rank:
        pytest.skip("rank 0 prunes and the others are done")
    with pytest.raises(kit.Killed):
        kit.on_ranks(2, work)
    loaded = kit.newest(tmp_path, world=3)
    committed = point in ("P7", "P8", "P9")
    if rank == 0:
        assert loaded.step == (4 if committed else 2)
    assert kit.same(loaded, loaded.step)
    assert loaded.rejected == ()
    assert not [name for name in kit.names(tmp_path) if name.startswith(".")]


@pytest.mark.row(2)
def test_a_kill_between_replacing_and_committing(kit, tmp_path: Path) -> None:
    """Another history's step 4 has been moved out of the way, the new one is not there yet."""
    kit.filled(tmp_path, 4)
    (tmp_path / "step-00000004").rename(tmp_path / ".replaced-step-00000004")
    (tmp_path / ".tmp-step-00000004").mkdir()
    assert kit.same(kit.newest(tmp_path), 4)
    assert kit.names(tmp_path) == ["latest", "step-00000004"]


def test_a_failed_rename_brings_the_replaced_one_back(kit, tmp_path: Path, monkeypatch) -> None:
    kit.filled(tmp_path, 2, 4)
    store = CheckpointStore(tmp_path, OneRank())
    store.load(tmp_path / "step-00000002")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SaveFailed, match="Input/output error"):
        kit.save(store, OneRank(), 4)
    assert store.steps() == [4, 2]


@pytest.mark.row(9)
def test_a_disk_that_fills_up_while_torch_writes(kit, tmp_path: Path, monkeypatch) -> None:
    """A real OSError below torch.save, which wraps it in one of its own."""
    from torch.distributed.checkpoint import filesystem

    class Full:
        def __init__(self, file) -> None:
            self.file, self.room = file, 3000

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise full()
            return self.file.write(data)

    import contextlib

    @contextlib.contextmanager
    def small(self, path: Path, mode: str):
        with Path(path).open(mode) as stream:
            yield Full(stream)

    store = CheckpointStore(tmp_path, OneRank())
    kit.save(store, OneRank(), 2)
    with monkeypatch.context() as patched:
        patched.setattr(filesystem.FileSystem, "create_stream", small)
        with pytest.raises(SaveFailed, match=r"disk full: need .*, have"):
            kit.save(store, OneRank(), 4)
    assert store.steps() == [2]
    kit.save(store, OneRank(), 4)
    assert kit.same(kit.newest(tmp_path), 4)
