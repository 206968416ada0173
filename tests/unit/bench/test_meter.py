"""The clock: what is discarded, what is measured, when it is done; and the rows it may be fed with."""

import pytest
import torch
from tiny import batch, documents

from distft.bench import meter
from distft.bench.meter import Clock, spread
from distft.bench.mock_rows import FullSteps
from distft.core.types import IGNORE, LossTerms, StepReport, TrainState

TERMS = LossTerms(loss_sum=torch.zeros(()))


def test_quantiles() -> None:
    found = spread([float(value) for value in range(11)])
    assert (found.median, found.p10, found.p90) == (5.0, 1.0, 9.0)
    assert spread([2.0]) == meter.Spread(median=2.0, p10=2.0, p90=2.0)
    assert spread([1.0, 1.0, 1.0, 100.0]).median == 1.0


def report(loss: float = 1.0, *, updated: bool = True) -> StepReport:
    return StepReport(step=1, loss=loss, grad_norm=1.0, lr=0.1, denominator=10.0, updated=updated)


def run(clock: Clock, most: int = 200) -> int:
    """Steps taken until it is done; each has two micro-batches of 26 tokens."""
    state, rows = TrainState(), batch(documents([17, 9]))
    for taken in range(1, most):
        for _ in range(2):
            clock.micro(rows, TERMS)
        state = state.after(report(), samples=2, tokens=52, tokens_loss=48)
        clock.step(state, report(float(taken)))
        if clock.done:
            return taken
    raise AssertionError("never done")


def test_warm_up_is_discarded_and_edges_are_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    times = iter(range(1000))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: float(next(times)))
    clock = Clock(warmup=3, steps=4, sync=lambda: synced.append(1.0))
    assert run(clock) == 7
    assert len(synced) == 2, "at the two edges of the block and nowhere else"
    assert clock.discarded == 3
    assert len(clock.times_s) == 4
    assert sum(clock.times_s) == clock.block_s
    assert clock.losses == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "the curve is kept whole"
    assert (clock.tokens, clock.tokens_loss, clock.slots) == (4 * 52, 4 * 48, 4 * 52)
    assert clock.squares == 4 * 2 * (17**2 + 9**2)


def test_nothing_is_measured_while_graphs_are_compiled() -> None:
    graphs = iter([1, 1, 2, 2, 2, 3, *[3] * 100])
    clock = Clock(warmup=2, steps=2, graphs=lambda: next(graphs))
    assert run(clock) == 6 + meter.SETTLED_STEPS + 2
    assert clock.settled


def test_endless_compilation_is_measured_and_flagged() -> None:
    graphs = iter(range(1, 1000))
    clock = Clock(warmup=2, steps=2, graphs=lambda: next(graphs))
    assert run(clock) == 2 + meter.MOST_WARMUP + 2
    assert not clock.settled


def test_updates_left_out_are_counted() -> None:
    clock = Clock(warmup=1, steps=1)
    clock.step(TrainState(step=1), report(updated=False))
    assert clock.left_out == 1


def full(rank: int, world: int, micro: int) -> FullSteps:
    return FullSteps(
        seed=3, vocabulary=50, max_length=8, num_steps=2, global_batch_size=4, micro_batch_size=micro, rank=rank,
        world=world,
    )  # fmt: skip


def test_mock_rows_are_the_same_however_they_are_spread() -> None:
    alone = [torch.cat([micro.input_ids_T for micro in step]) for step in full(0, 1, 4).from_step(0)]
    ranks = [list(full(rank, 2, 1).from_step(0)) for rank in range(2)]
    spread_out = [torch.cat([micro.input_ids_T for rank in ranks for micro in rank[step]]) for step in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, spread_out, strict=True))
    assert not torch.equal(alone[0], alone[1])
    (later,) = full(0, 1, 4).from_step(1)
    assert torch.equal(later[0].input_ids_T, alone[1]), "seeking gives the same rows"


def test_mock_rows_are_full_and_supervised() -> None:
    (micro,), _ = full(0, 1, 4).from_step(0)
    assert (micro.num_tokens, micro.num_supervised, micro.max_seqlen) == (32, 28, 8)
    assert int((micro.labels_T != IGNORE).sum()) == 28
    kept = micro.labels_T != IGNORE
    assert torch.equal(micro.labels_T[kept], micro.input_ids_T.roll(-1)[kept])
    assert micro.position_ids_T.tolist() == list(range(8)) * 4
    assert micro.cu_seqlens.tolist() == [0, 8, 16, 24, 32]


def test_mock_rows_of_pairs_share_a_sequence() -> None:
    steps = FullSteps(
        seed=3, vocabulary=50, max_length=9, num_steps=1, global_batch_size=2, micro_batch_size=2, rank=0, world=1,
        group_size=2, values=("margin_G",),
    )  # fmt: skip
    [[micro]] = steps.from_step(0)
    assert micro.cu_seqlens.tolist() == [0, 4, 9, 13, 18]
    assert micro.position_ids_T.tolist() == [*range(4), *range(5)] * 2
    assert (micro.group_sizes, micro.num_documents, micro.num_supervised) == ((2, 2), 4, 14)
    assert [index for index, label in enumerate(micro.labels_T.tolist()) if label == IGNORE] == [3, 8, 12, 17]
    assert micro.columns["margin_G"].tolist() == [0, 1]
