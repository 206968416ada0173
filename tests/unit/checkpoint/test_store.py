"""Round trips, retention, and what a user or a disk can do to a checkpoint."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_rank import OneRank
from torch.distributed.checkpoint import FileSystemReader

from distft.checkpoint import intervals, saving
from distft.checkpoint.commit import SaveFailed
from distft.checkpoint.intervals import Piece, parse_index
from distft.checkpoint.manifest import entry_of, read_manifest
from distft.checkpoint.shards import write_dcp_metadata
from distft.checkpoint.store import CheckpointStore
from distft.core.errors import CheckpointError, FileSystemError


@pytest.mark.row(16)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_any_slicing_reads_any_other(kit, tmp_path: Path, monkeypatch, before: int, after: int) -> None:
    monkeypatch.setattr(intervals.split_chunks, "__kwdefaults__", {"chunk_bytes": 640})  # several chunks per piece
    kit.filled(tmp_path, 4, world=before)
    want = kit.tensors(4)

    def work(group) -> None:
        loaded = CheckpointStore(tmp_path, group, faults=kit.Quiet()).load_newest()
        for piece in kit.sliced(want, group.rank, group.world, shift=7):
            got = loaded.reader.read(piece.name, piece.start, piece.stop)
            assert got.dtype == piece.data.dtype
            assert torch.equal(got, piece.read())
        assert loaded.state == {"step": 4, "seen": [1, 2]}
        assert loaded.manifest.world == before

    kit.on_ranks(after, work)


def test_plain_dcp_reads_it_too(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 4, world=2)
    whole = {name: torch.empty_like(tensor) for name, tensor in kit.tensors(4).items()}
    torch.distributed.checkpoint.load(whole, checkpoint_id=str(tmp_path / "step-00000004"), no_dist=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in kit.tensors(4).items())


def test_the_same_state_gives_the_same_bytes(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path / "a", 4)
    kit.filled(tmp_path / "b", 4)
    for name in kit.names(tmp_path / "a" / "step-00000004"):
        files = [tmp_path / run / "step-00000004" / name for run in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_unusual_dtypes_and_numbers(tmp_path: Path) -> None:
    data = {
        "f8": torch.randn(33).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64),
        "strided": torch.arange(10)[::2],
        "one": torch.ones(1, requires_grad=True),
    }
    store = CheckpointStore(tmp_path, OneRank())
    store.save([Piece(n, 0, t.numel(), t) for n, t in data.items()], {"best": float("inf")}, step=1)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.state == {"best": float("inf")}
    for name, tensor in data.items():
        got = loaded.reader.read(name)
        assert got.dtype == tensor.dtype
        assert got.view(torch.uint8).tolist() == tensor.detach().contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("intervals_of_ranks", "message"),
    [
        ([(0, 4), (5, 10)], r"w: nobody wrote elements \[4, 5\) of 10"),
        ([(0, 6), (5, 10)], r"w: elements \[5, 6\) of 10 written twice"),
        ([(0, 10), (0, 10)], "w: elements .* written twice"),
        ([(0, 4), (4, 9)], r"w: nobody wrote elements \[9, 10\)"),
        ([(0, 0), (1, 10)], r"w: nobody wrote elements \[0, 1\)"),
        ([(0, 5), (5, 12)], r"w: piece \[5, 12\) is outside \[0, 10\)"),
    ],
)
def test_pieces_must_tile(kit, tmp_path: Path, intervals_of_ranks, message: str) -> None:
    def work(group) -> None:
        store = CheckpointStore(tmp_path, group)
        start, stop = intervals_of_ranks[group.rank]
        with pytest.raises(SaveFailed, match=message):
            store.save([Piece("w", start, 10, torch.zeros(stop - start))], {}, step=1)
        assert store.failures_in_a_row == 1

    kit.on_ranks(2, work)
    assert kit.names(tmp_path) == []


def test_ranks_must_agree_on_shape_dtype_and_step(kit, tmp_path: Path) -> None:
    def work(group) -> None:
        store = CheckpointStore(tmp_path, group)
        half = torch.zeros(2, dtype=(torch.float32, torch.float64)[group.rank])
        with pytest.raises(SaveFailed, match="w: 4 x float32 on one rank, 4 x float64 on another"):
            store.save([Piece("w", 2 * group.rank, 4, half)], {}, step=1)
        with pytest.raises(SaveFailed, match="rank 0: is at step 5; rank 1: is at step 6"):
            store.save([], {}, step=5 + group.rank)
        with pytest.raises(SaveFailed, match="not JSON serializable"):
            store.save([], {"bad": torch.zeros(1)}, step=7)
        assert store.failures_in_a_row == 3

    kit.on_ranks(2, work)
    assert kit.names(tmp_path) == []


def test_reader_refuses_what_is_not_there(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 4)
    reader = kit.newest(tmp_path).reader
    with pytest.raises(CheckpointError, match=r'no tensor "param/b.weightless".*nearest: param/a.weight'):
        reader.read("param/b.weightless")
    with pytest.raises(CheckpointError, match=r"no elements \[1000, 1002\) in a tensor of 1001"):
        reader.read("param/a.weight", 1000, 1002)
    assert reader.read("param/a.weight", 5, 5).numel() == 0


def test_too_many_chunks_for_dcps_own_metadata(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be made afterwards, when nobody waits for it."""
    kit.filled(tmp_path / "whole", 2)
    monkeypatch.setattr(saving, "DCP_CHUNKS", 1)
    kit.filled(tmp_path / "without", 2)
    whole, without = (next((tmp_path / name).glob("step-*")) for name in ("whole", "without"))
    assert set(kit.names(whole)) - set(kit.names(without)) == {".metadata"}
    loaded = kit.newest(tmp_path / "without")
    index = (without / "index.json").read_bytes()
    write_dcp_metadata(without, parse_index(index, loaded.manifest.file_bytes))
    said = [FileSystemReader(path).read_metadata() for path in (without, whole)]
    assert said[0].state_dict_metadata == said[1].state_dict_metadata
    assert said[0].storage_data == said[1].storage_data


FILES = [
    ".metadata",
    "MANIFEST.json",
    "__0_0.distcp",
    "__1_0.distcp",
    "index.json",
    "state.json",
]


@pytest.mark.row(11, 12)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "link"])
@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_is_noticed_and_named(kit, tmp_path: Path, name: str, damage: str) -> None:
    kit.filled(tmp_path, 2, 4)
    bad = tmp_path / "step-00000004"
    assert kit.names(bad) == FILES
    harm(bad / name, damage)
    loaded = kit.newest(tmp_path)
    assert loaded.step == 2
    assert kit.same(loaded, 2)
    assert name in loaded.rejected[0]
    assert name in (tmp_path / "step-00000004.corrupt-1" / "WHY.txt").read_text()
    assert not bad.exists()


def harm(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "link":
        elsewhere = path.parent.parent / f"elsewhere-{path.name}"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    else:
        path.unlink()


@pytest.mark.row(11)
def test_every_bit_of_a_manifest_counts(kit, tmp_path: Path) -> None:
    from distft.checkpoint.manifest import parse_manifest

    kit.filled(tmp_path, 4, world=1)
    data = (tmp_path / "step-00000004" / "MANIFEST.json").read_bytes()
    for at in range(len(data)):
        with pytest.raises(CheckpointError):
            parse_manifest(data[:at] + bytes([data[at] ^ (1 << (at % 7))]) + data[at + 1 :])


@pytest.mark.row(14)
def test_all_bad_is_an_error_now_and_later(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    shutil.rmtree(tmp_path / "step-00000004")
    (tmp_path / "step-00000004").mkdir()
    for _ in range(2):  # the second start finds them quarantined and must not begin anew in silence either
        with pytest.raises(CheckpointError, match="no valid checkpoint among 2") as caught:
            kit.newest(tmp_path)
        assert "state.json: 2 bytes instead of" in str(caught.value)
        assert "MANIFEST.json is missing" in str(caught.value)


@pytest.mark.row(13)
def test_latest_is_only_a_hint(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    for text in ("garbage \x00", "step-00000009", "../../etc"):
        (tmp_path / "latest").write_text(text)
        assert kit.newest(tmp_path).step == 4
    (tmp_path / "latest").unlink()
    assert kit.newest(tmp_path).step == 4


@pytest.mark.row(43)
def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_said(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    for step, seconds in ((2, 4e9), (4, 0)):  # a century ahead, and 1970
        folder = tmp_path / f"step-{step:08d}"
        for path in (*folder.iterdir(), folder):
            os.utime(path, (seconds, seconds))
    assert kit.newest(tmp_path).step == 4
    kit.filled(tmp_path, 6)
    assert CheckpointStore(tmp_path, OneRank()).steps() == [6, 4], "retention goes by steps too"


def test_no_checkpoint_is_no_error(kit, tmp_path: Path) -> None:
    assert kit.newest(tmp_path / "new") is None


def test_a_renamed_checkpoint_is_not_taken_for_another_step(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000009")
    assert kit.newest(tmp_path).step == 2


@pytest.mark.row(15)
def test_folders_that_are_not_shared(kit, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"output_dir is not shared.*rank 1 does not see"):
        kit.on_ranks(2, lambda group: CheckpointStore(tmp_path / str(group.rank), group))


@pytest.mark.row(15)
def test_listings_that_differ(kit, tmp_path: Path, monkeypatch) -> None:
    kit.filled(tmp_path, 2)
    with pytest.raises(CheckpointError, match="output_dir is not shared"):
        kit.on_ranks(2, lambda group: _blind_store(tmp_path, group).load_newest())


def _blind_store(folder: Path, group) -> CheckpointStore:
    store = CheckpointStore(folder, group)
    if group.rank == 1:
        store._folders.steps = lambda: []  # type: ignore[method-assign]
    return store


@pytest.mark.row(45)
def test_retention_spares_best_verified_and_pinned(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 1, 2, keep=3)

    def work(group) -> None:
        store = CheckpointStore(tmp_path, group, keep=2)
        assert store.load_newest().step == 2  # verified from now on
        kit.save(store, group, 3)
        if group.rank == 0:
            (tmp_path / "step-00000003" / "PINNED").touch()
        kit.save(store, group, 4, best={"step": 4, "eval_loss": 1.0})
        for step in range(5, 10):
            kit.save(store, group, step)

    kit.on_ranks(2, work)
    steps = ["step-00000002", "step-00000003", "step-00000004", "step-00000008", "step-00000009"]
    assert kit.names(tmp_path) == ["best.json", "latest", *steps]
    harm(tmp_path / "step-00000009" / "__1_0.distcp", "flip")
    harm(tmp_path / "step-00000008" / "MANIFEST.json", "empty")
    loaded = kit.newest(tmp_path)
    assert loaded.step == 4
    assert len(loaded.rejected) == 2


@pytest.mark.row(45)
def test_unreadable_best_deletes_nothing(kit, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, OneRank())
    kit.save(store, OneRank(), 1, best={"step": 1})
    (tmp_path / "best.json").write_text("{")
    for step in range(2, 6):
        kit.save(store, OneRank(), step)
    assert store.steps() == [5, 4, 3, 2, 1]
    kit.save(store, OneRank(), 6, best={"step": 1})
    assert store.steps() == [6, 5, 1]


def test_saving_a_step_twice_keeps_the_first_and_renews_best(kit, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, OneRank())
    kit.save(store, OneRank(), 4)
    before = (tmp_path / "step-00000004").stat().st_ino
    assert kit.save(store, OneRank(), 4, best={"step": 4}).num_bytes == 0
    assert (tmp_path / "step-00000004").stat().st_ino == before
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4}


def test_a_rollback_replaces_later_checkpoints(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4, 6, keep=3)
    store = CheckpointStore(tmp_path, OneRank())
    assert store.load(tmp_path / "step-00000002").step == 2
    store.save([Piece("new", 0, 3, torch.ones(3))], {}, step=4)  # the other history's step 4 gives way
    assert store.steps() == [6, 4, 2]
    assert list(store.load(tmp_path / "step-00000004").reader) == ["new"]
    assert store.set_aside_after(4) == ["step-00000006.aside-1"]
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 4
    assert not [name for name in kit.names(tmp_path) if name.startswith(".")]


@pytest.mark.row(38)
def test_explicit_path_is_checked_and_left_alone(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    store = CheckpointStore(tmp_path, OneRank())
    harm(tmp_path / "step-00000004" / "state.json", "truncate")
    with pytest.raises(CheckpointError, match=r"step-00000004: not a valid checkpoint: state.json"):
        store.load(tmp_path / "step-00000004")
    assert (tmp_path / "step-00000004").exists()
    (tmp_path / "link").symlink_to(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="is a link"):
        store.load(tmp_path / "link")


@pytest.mark.row(9)
def test_disk_full_before_the_save(kit, tmp_path: Path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path, OneRank())
    kit.save(store, OneRank(), 2)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=2048))
    with pytest.raises(SaveFailed, match=r"disk full: need .* KiB, have 2.0 KiB; earlier checkpoints are untouched"):
        kit.save(store, OneRank(), 4)
    assert store.steps() == [2]


@pytest.mark.row(31)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileSystemError, match="choose another output_dir"):
        CheckpointStore(tmp_path / "checkpoints", OneRank())
    tmp_path.chmod(0o700)


@pytest.mark.row(31)
def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(FileSystemError, match="File exists"):
        CheckpointStore(tmp_path / "checkpoints", OneRank())


def test_files_of_ranks_that_older_versions_wrote_do_no_harm(kit, tmp_path: Path) -> None:
    """Every rank once wrote a `rank-NNNNN.json` of `{}` into each checkpoint."""
    kit.filled(tmp_path, 2, world=2)
    step = tmp_path / "step-00000002"
    manifest = read_manifest(step)
    for rank in range(2):
        (step / f"rank-{rank:05d}.json").write_text("{}\n")
    files = [*manifest.files, *(entry_of(step / f"rank-{rank:05d}.json") for rank in range(2))]
    older = replace(manifest, files=tuple(sorted(files, key=lambda file: file.path)))
    (step / "MANIFEST.json").write_bytes(older.to_bytes())
    loaded = kit.newest(tmp_path)
    assert kit.same(loaded, 2)
    assert not loaded.rejected
    harm(step / "rank-00001.json", "flip")
    with pytest.raises(CheckpointError, match=r"rank-00001\.json: sha256 does not match"):
        kit.newest(tmp_path)
