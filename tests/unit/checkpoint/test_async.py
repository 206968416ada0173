"""Saving in the background: what training waits for, one at a time, and where errors come out."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_rank import OneRank

from distft.checkpoint.commit import SaveFailed
from distft.checkpoint.intervals import CHUNK_BYTES, Piece
from distft.checkpoint.staging import StagingBuffer
from distft.checkpoint.store import CheckpointStore
from distft.core.types import Deferred
from distft.engine.fragments import Fragment
from distft.engine.fragments import pieces as fragment_pieces


class Gate:
    """Holds the writing thread at P3 until opened."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        if point == "P3":
            self.reached.set()
            assert self.open.wait(20)


def test_what_is_saved_is_what_was_handed_over(tmp_path: Path) -> None:
    gate, weights, state = Gate(), torch.arange(1000.0), {"step": 1, "seen": [1]}
    store = CheckpointStore(tmp_path, OneRank(), faults=gate)
    store.save_async([Piece("w", 0, 1000, weights)], state, step=1)
    assert store.in_flight
    weights += 1  # the next optimizer step
    state["seen"].append(2)
    assert store.poll() is None
    assert store.steps() == []
    gate.open.set()
    saved = poll_until(store)
    assert (saved.step, saved.path.name, store.in_flight) == (1, "step-00000001", False)
    assert store.poll() is None
    loaded = store.load_newest()
    assert loaded is not None
    assert torch.equal(loaded.reader.read("w"), torch.arange(1000.0))
    assert loaded.state == {"step": 1, "seen": [1]}


def poll_until(store: CheckpointStore):
    for _ in range(400):
        saved = store.poll()
        if saved:
            return saved
        time.sleep(0.01)
    raise AssertionError("never committed")


def test_poll_commits_only_when_all_ranks_have_written(kit, tmp_path: Path) -> None:
    gates = [Gate(), Gate()]
    gates[0].open.set()

    def work(group) -> None:
        store = CheckpointStore(tmp_path, group, faults=gates[group.rank])
        store.save_async(kit.sliced(kit.tensors(4), group.rank, 2), {"step": 4}, step=4)
        gates[group.rank].reached.wait(20)
        for _ in range(5):
            assert store.poll() is None
        assert store.steps() == []
        group.barrier()
        gates[1].open.set()
        saved = store.finish()
        assert saved is not None
        assert saved.step == 4

    kit.on_ranks(2, work)
    assert kit.same(kit.newest(tmp_path), 4)


def test_a_second_save_waits_for_the_first(kit, tmp_path: Path) -> None:
    gate = Gate()
    store = CheckpointStore(tmp_path, OneRank(), faults=gate)
    store.save_async(kit.sliced(kit.tensors(2), 0, 1), {"step": 2}, step=2)
    threading.Timer(0.3, gate.open.set).start()
    assert store.save_async(kit.sliced(kit.tensors(4), 0, 1), {"step": 4}, step=4) > 0.2
    assert store.steps() == [2]
    assert kit.save(store, OneRank(), 6).step == 6  # a preemption save: commits step 4 first
    assert store.steps() == [6, 4]  # keep = 2
    assert [store.poll().step, store.poll().step, store.poll()] == [2, 4, None]  # type: ignore[union-attr]


def test_an_error_in_the_thread_comes_out_on_all_ranks(kit, tmp_path: Path) -> None:
    def work(group) -> None:
        hook = kit.Hook("P2", lambda: OSError(5, "Input/output error"), rank=1, step=4)
        store = CheckpointStore(tmp_path, group, faults=hook)
        kit.save(store, group, 2)
        store.save_async(kit.sliced(kit.tensors(4), group.rank, 2), {"step": 4}, step=4)
        with pytest.raises(SaveFailed, match="rank 1: Input/output error"):
            store.finish()
        assert store.failures_in_a_row == 1
        assert store.finish() is None

    kit.on_ranks(2, work)
    assert kit.newest(tmp_path).step == 2


def test_a_piece_that_does_not_fit_fails_the_save_not_the_run(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, OneRank())
    store.save_async([Piece("w", 5, 6, torch.zeros(3))], {}, step=1)
    with pytest.raises(SaveFailed, match=r"w: piece \[5, 8\) is outside \[0, 6\)"):
        store.finish()


def test_a_failure_is_told_even_when_the_next_save_comes_first(kit, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, OneRank(), faults=kit.Hook("P3", lambda: OSError(5, "broken"), step=2))
    store.save_async(kit.sliced(kit.tensors(2), 0, 1), {"step": 2}, step=2)
    assert kit.save(store, OneRank(), 4).step == 4
    with pytest.raises(SaveFailed, match="step 2 was not saved"):
        store.poll()
    assert store.poll() is None
    assert store.failures_in_a_row == 0


def test_staging_cuts_reuses_and_keeps_every_element() -> None:
    stage = StagingBuffer()
    big = torch.arange(CHUNK_BYTES // 4 + 1000, dtype=torch.int32)
    pieces = [Piece("odd", 7, 10, torch.ones(3, dtype=torch.uint8)), Piece("big", 0, big.numel(), big)]
    pieces.append(Piece("none", 0, 0, torch.zeros(0)))
    first = stage.take(pieces)
    assert [(p.name, p.start) for p in first[:2]] == [("odd", 7), ("big", 0)]
    assert torch.equal(torch.cat([p.data for p in first if p.name == "big"]), big)
    assert first[-1].name == "none"
    addresses = [p.data.data_ptr() for p in first[:-1]]
    assert [p.data.data_ptr() for p in stage.take(pieces)[:-1]] == addresses
    assert all(p.data.numel() * p.data.element_size() <= CHUNK_BYTES for p in first)


def test_training_waits_for_the_copy_only(tmp_path: Path) -> None:
    """Of a save of 64 MB; the bound is loose because test machines are busy (benchmarks measure it)."""
    pieces = [Piece(f"w{n}", 0, 2**22, torch.randn(2**22)) for n in range(4)]
    store = CheckpointStore(tmp_path, OneRank())
    store.reserve(pieces)
    sync_s = min(store.save(pieces, {}, step=step).blocked_s for step in (2, 3))
    blocked = []
    for step in (4, 5, 6):
        store.save_async(pieces, {}, step=step)
        saved = poll_until(store)
        blocked.append(saved.blocked_s)
    assert min(blocked) < 0.5 * sync_s


@pytest.mark.parametrize("saves", ["staged", "written"])
def test_what_is_made_on_reading_is_never_whole(tmp_path: Path, saves: str) -> None:
    """8-bit moments stand for four times their bytes: a piece is made a block at a time, each element once."""
    numel, made = 2 * (CHUNK_BYTES // 4) + 1000, []

    def make(begin: int, end: int) -> torch.Tensor:
        made.append((begin, end))
        return torch.arange(begin, end, dtype=torch.float32)

    values = Deferred(length=numel, dtype=torch.float32, device=torch.device("cpu"), make=make)
    piece = Piece("exp_avg/w", 0, numel, values)
    assert (piece.stop, piece.num_bytes) == (numel, 4 * numel)
    store = CheckpointStore(tmp_path, OneRank())
    if saves == "staged":
        store.save_async([piece], {"step": 1}, step=1)
        store.finish()
    else:
        store.save([piece], {"step": 1}, step=1)
    assert sorted(made)[0][0] == 0
    assert sum(end - begin for begin, end in made) == numel
    assert max(end - begin for begin, end in made) * 4 <= CHUNK_BYTES
    loaded = store.load_newest()
    assert loaded is not None
    assert torch.equal(loaded.reader.read("exp_avg/w"), torch.arange(numel, dtype=torch.float32))


def test_8bit_moments_are_read_in_any_part(tmp_path: Path) -> None:
    """Parts that do not begin where quantisation blocks do, and a fragment that lies within a flat tensor."""
    functional = pytest.importorskip("bitsandbytes").functional
    flat = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    codes, about = functional.quantize_blockwise(flat, blocksize=256)
    whole = functional.dequantize_blockwise(codes, about, blocksize=256)
    state = {"state1": codes, "absmax1": about.absmax, "qmap1": about.code}
    held = Fragment(
        name="w", start=40, numel=9000, length=3000, flat=torch.zeros(5000), offset=700, layout="l", writes_blocks=False
    )
    optimizer = SimpleNamespace(state={held.flat: state})
    moment = next(piece for piece in fragment_pieces([held], optimizer) if piece.name == "exp_avg/w")
    assert (moment.start, moment.stop) == (40, 3040)
    assert torch.equal(moment.read(), whole[700:3700])
    assert torch.equal(moment.read(100, 999), whole[800:1699])
    assert torch.equal(moment.part(250, 1300).part(1, 600).read(3, 7), whole[700 + 254 : 700 + 258])
