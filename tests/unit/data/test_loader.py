"""Steps and batches: the same documents whatever the world, labels that never cross one, exact seeking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_kit import table_of, texts

from distft.core.errors import DataError
from distft.core.types import IGNORE, Batch
from distft.data.batch import build_batch
from distft.data.loader import EvalSteps, Steps
from distft.data.prefetch import prefetched
from distft.data.store import Prepared

MAX_LENGTH = 32


@pytest.fixture
def rows(write: Callable[..., Path], prepared: Callable[..., Prepared]) -> Prepared:
    """60 documents of 2 to 31 tokens."""
    lengths = np.random.default_rng(1).integers(2, MAX_LENGTH, 60).tolist()
    return prepared(write(texts(lengths)), max_length=MAX_LENGTH)


def steps_of(rows: Prepared, *, packing: bool = True, **changed: Any) -> Steps:
    keys = {"seed": 1, "epochs": 2.0, "max_steps": None, "global_batch_size": 8, "micro_batch_size": 2} | changed
    return Steps(rows, table_of(rows.report.sources[0].path, max_length=MAX_LENGTH, packing=packing), **keys)


def documents(batch: Batch) -> list[list[int]]:
    bounds = batch.cu_seqlens.tolist()
    return [batch.input_ids_T[a:b].tolist() for a, b in pairwise(bounds)]


def test_a_batch_is_documents_end_to_end(rows: Prepared) -> None:
    batch = build_batch(rows, [3, 0, 7], position=5, max_length=MAX_LENGTH)
    assert documents(batch) == [rows.row(row)[0].tolist() for row in (3, 0, 7)]
    lengths = [int(rows.lengths[row]) for row in (3, 0, 7)]
    assert batch.position_ids_T.tolist() == [at for length in lengths for at in range(length)]
    assert (batch.max_seqlen, batch.num_tokens, batch.position) == (max(lengths), sum(lengths), 5)
    assert batch.sample_ids == ("train.jsonl row 4", "train.jsonl row 1", "train.jsonl row 8")
    assert (batch.input_ids_T.dtype, batch.labels_T.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )


def test_a_label_is_the_next_token_of_the_same_document(tokenizer: Path, write: Any, prepared: Any) -> None:
    pairs = prepared(
        write([{"prompt": "\x01\x02", "completion": "\x03\x04"}, {"prompt": "\x05", "completion": "\x06"}])
    )
    batch = build_batch(pairs, [0, 1], position=0, max_length=MAX_LENGTH)
    ids = batch.input_ids_T.tolist()
    assert batch.labels_T.tolist() == [IGNORE, ids[2], ids[3], ids[4], IGNORE, ids[6], ids[7], IGNORE]
    assert batch.num_supervised == 5 == int(pairs.supervised.sum())


def test_an_empty_micro_batch_is_one_filler_token(rows: Prepared) -> None:
    batch = build_batch(rows, [], position=9, max_length=MAX_LENGTH)
    assert (batch.input_ids_T.tolist(), batch.labels_T.tolist(), batch.cu_seqlens.tolist()) == ([0], [IGNORE], [0, 1])
    assert (batch.num_tokens, batch.num_supervised, batch.sample_ids, batch.max_seqlen) == (0, 0, (), 1)


@pytest.mark.parametrize("chosen", [[], [0], [0, 1, 2]])
def test_padding_gives_a_constant_size_in_documents_of_their_own(rows: Prepared, chosen: list[int]) -> None:
    batch = build_batch(rows, chosen, position=0, pad_to=128, max_length=MAX_LENGTH)
    real = int(rows.lengths[chosen].sum())
    assert (len(batch.input_ids_T), int(batch.cu_seqlens[-1]), batch.num_tokens) == (128, 128, real)
    assert (batch.labels_T[real:] == IGNORE).all()
    assert batch.max_seqlen <= MAX_LENGTH
    assert int(batch.position_ids_T.max()) < MAX_LENGTH
    with pytest.raises(ValueError, match="do not fit into pad_to"):
        build_batch(rows, [0, 1, 2], position=0, pad_to=4, max_length=MAX_LENGTH)


@pytest.mark.row(16)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_world_and_micro_batch_change_nothing(rows: Prepared, packing: bool, world: int, micro: int) -> None:
    reference = list(steps_of(rows, packing=packing, prefetch=0).from_step(0))
    ranks = [
        list(steps_of(rows, packing=packing, micro_batch_size=micro, rank=rank, world=world).from_step(0))
        for rank in range(world)
    ]
    for step, micros in enumerate(reference):
        dealt = [batch for rank in ranks for batch in rank[step]]
        assert len({len(rank[step]) for rank in ranks}) == 1
        assert [batch.position for batch in dealt] == [step * 8 + at * micro for at in range(8 // micro)]
        real = [document for batch in dealt if batch.num_tokens for document in documents(batch)]
        assert real == [document for batch in micros if batch.num_tokens for document in documents(batch)]
        ids = [name for batch in dealt for name in batch.sample_ids]
        assert tuple(ids) == steps_of(rows, packing=packing).sample_ids(step)


@pytest.mark.parametrize("packing", [True, False])
def test_seeking_equals_dropping(rows: Prepared, packing: bool) -> None:
    steps = steps_of(rows, packing=packing, epochs=3.0)
    every = [[batch.sample_ids for batch in micros] for micros in steps.from_step(0)]
    assert len(every) == steps.num_steps
    for at in range(steps.num_steps):
        assert [[batch.sample_ids for batch in micros] for micros in steps.from_step(at)] == every[at:]


@pytest.mark.parametrize("packing", [True, False])
def test_two_epochs_hold_every_row_twice(rows: Prepared, packing: bool) -> None:
    steps = steps_of(rows, packing=packing)
    names = [name for micros in steps.from_step(0) for batch in micros for name in batch.sample_ids]
    assert sorted(names) == sorted([rows.sample_id(row) for row in range(60)] * 2)
    assert sum(batch.num_tokens for micros in steps.from_step(0) for batch in micros) == 2 * steps.tokens_per_epoch
    assert sum(b.num_supervised for micros in steps.from_step(0) for b in micros) == 2 * steps.supervised_per_epoch


def test_only_the_last_step_is_short(rows: Prepared) -> None:
    steps = steps_of(rows, packing=False, epochs=1.0)
    assert (steps.num_samples, steps.num_steps) == (60, 8)
    assert [steps.samples_in(step) for step in range(8)] == [8] * 7 + [4]
    *_, last = steps.from_step(0)
    assert [batch.num_tokens > 0 for batch in last] == [True, True, False, False]


def test_length_of_a_run(rows: Prepared) -> None:
    sequences = {
        (1.5, None): 90,
        (0.5, None): 30,
        (None, 20): 160,
        (1.0, 3): 24,
        (1.0, 100): 60,
    }
    for (epochs, max_steps), expected in sequences.items():
        assert steps_of(rows, packing=False, epochs=epochs, max_steps=max_steps).num_samples == expected
    steps = steps_of(rows, packing=False, epochs=2.0)
    assert [steps.epoch_at(samples) for samples in (0, 30, 60, 120)] == [0.0, 0.5, 1.0, 2.0]


def test_fill_counts_real_tokens(rows: Prepared) -> None:
    packed, alone = steps_of(rows), steps_of(rows, packing=False)
    assert alone.fill == pytest.approx(int(rows.lengths.sum()) / (60 * MAX_LENGTH))
    assert packed.fill > 0.9 > alone.fill
    assert packed.fill == pytest.approx(packed.tokens_per_epoch / (packed.order.per_epoch * MAX_LENGTH))


@pytest.mark.row(25)
def test_fewer_sequences_than_a_global_batch(rows: Prepared) -> None:
    with pytest.raises(
        DataError, match=r"the run has 60 sequences \(60 an epoch, from 60 rows\), fewer .* = 128  lower"
    ):
        steps_of(rows, packing=False, epochs=1.0, global_batch_size=128)
    assert steps_of(rows, packing=False, epochs=3.0, global_batch_size=128).num_steps == 2


def test_ranks_that_do_not_divide_the_batch(rows: Prepared) -> None:
    with pytest.raises(ValueError, match="3 ranks x micro-batches of 2 do not divide 8"):
        steps_of(rows, world=3)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 3), (4, 2)])
def test_held_out_rows_come_exactly_once(rows: Prepared, packing: bool, world: int, micro: int) -> None:
    table = table_of(rows.report.sources[0].path, max_length=MAX_LENGTH, packing=packing)
    ranks = [EvalSteps(rows, table, micro_batch_size=micro, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    names = [name for rank in ranks for batch in rank for name in batch.sample_ids]
    assert sorted(names) == sorted(rows.sample_id(row) for row in range(60))
    assert ranks[0][-1].position == ranks[0][len(ranks[0]) - 1].position


def test_prefetching_passes_errors_on_in_their_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise DataError("gone")

    items = prefetched(failing(), ahead=2)
    assert next(items) == 1
    with pytest.raises(DataError, match="gone"):
        next(items)


def test_a_closed_prefetch_ends_its_thread() -> None:
    items = prefetched(iter(range(1000)), ahead=1)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "distft-prefetch"]
