"""Numbers that are equal on all ranks in, decisions out."""

import pytest

from distft.core.errors import NumericError
from distft.core.phase import PHASE
from distft.core.types import StepReport, TrainState
from distft.guard import DivergenceGuard, RollBack
from distft.health.straggler import Timing, slowest
from distft.recipe.schema import GuardTable, SpikeParams, StragglerParams

NAN = float("nan")


class Alone:
    world = 1


class Told:
    """A guard, and what it has said."""

    def __init__(self, **table) -> None:
        self.said: list[str] = []
        self.events: list[tuple[str, dict]] = []
        self.guard = DivergenceGuard(
            GuardTable(**table), Alone(), say=self.said.append, note=lambda name, **f: self.events.append((name, f))
        )
        self.state = TrainState()

    def step(self, loss: float, norm: float = 1.0) -> bool:
        """As an engine does it; whether weights changed."""
        PHASE.step = self.state.step + 1
        finite = loss == loss and norm == norm
        updated = finite and self.guard.allow_update(loss)
        report = StepReport(
            step=self.state.step + 1,
            loss=loss,
            grad_norm=norm,
            lr=0.1,
            denominator=1.0,
            updated=updated,
            samples="rank 1: x",
        )
        self.state = self.state.after(report, samples=4, tokens=9, tokens_loss=9)
        self.guard.after(self.state, report)
        return updated


@pytest.mark.row(22, 23)
def test_a_number_that_is_not_finite_stops_the_run_by_default() -> None:
    run = Told()
    assert run.step(3.0)
    with pytest.raises(NumericError, match=r"step 2: loss nan is not finite, no weight was changed \(rank 1: x\)"):
        run.step(NAN)
    with pytest.raises(NumericError, match=r"step 3: gradient norm nan is not finite though every loss is"):
        run.step(2.0, NAN)


@pytest.mark.row(22, 23)
def test_skipping_has_an_end() -> None:
    run = Told(non_finite="skip", patience=2)
    assert [run.step(loss) for loss in (3.0, NAN, NAN, 3.0, NAN, NAN)] == [True, False, False, True, False, False]
    assert (run.state.step, run.state.left_out, run.state.updates) == (6, 4, 2)
    assert run.said[0] == "step 2 is left out: loss nan is not finite (rank 1: x)"
    assert run.events[0] == ("left_out", {"step": 2, "why": "loss nan is not finite", "samples": "rank 1: x"})
    with pytest.raises(NumericError, match="3 steps in a row: step 7"):
        run.step(NAN)


def test_a_spike_is_measured_against_the_median_of_what_was_accepted() -> None:
    run = Told(loss_spike=SpikeParams(action="skip", factor=2.0, window=5), patience=9)
    assert all(run.step(loss) for loss in (9.0, 4.0, 2.0, 2.0, 2.0)), "before the window is full nothing is a spike"
    assert not run.step(4.1)
    assert not run.step(4.1), "a spike does not raise the median"
    assert run.step(3.9)
    assert "loss 4.1 is 2.0 times the median 2 of 5 steps" in run.said[0]
    stop = Told(loss_spike=SpikeParams(action="stop", factor=2.0, window=5))
    assert all(stop.step(2.0) for _ in range(5))
    with pytest.raises(NumericError, match=r"step 6: loss 5 is 2.5 times the median"):
        stop.step(5.0)


def test_a_rollback_leaves_out_what_led_to_the_spike_and_has_an_end() -> None:
    table = {"loss_spike": SpikeParams(action="rollback", factor=2.0, window=5), "patience": 1}
    run = Told(**table)
    for _ in range(6):
        run.step(2.0)
    saved, at = run.guard.state(), run.state
    run.step(2.0)
    with pytest.raises(RollBack) as spike:
        run.step(7.0)
    assert spike.value.step == 8
    run.state = at
    run.guard.restore(saved, without=[7, 8])
    assert [run.step(2.0), run.step(7.0), run.step(2.0)] == [False, False, True]
    with pytest.raises(NumericError, match="after 1 rollbacks"):
        run.step(7.0)
    again = Told(**table)
    again.guard.restore(run.guard.state())
    again.state = at
    assert not again.step(2.0), "a run that was killed after a rollback leaves the same steps out"


def test_a_continued_run_sees_the_same_spikes() -> None:
    run = Told(loss_spike=SpikeParams(window=5))
    for _ in range(5):
        run.step(2.0)
    again = Told(loss_spike=SpikeParams(window=5))
    again.guard.restore(run.guard.state())
    again.state = run.state
    assert not again.step(4.5)


# -- stragglers ------------------------------------------------------------------------------------------------------


def timings(data: list[float], probe: list[float]) -> list[Timing]:
    return [
        Timing(who=f"node{r}, cuda:0", data_s=d, probe_s=p) for r, (d, p) in enumerate(zip(data, probe, strict=True))
    ]


@pytest.mark.row(42)
def test_the_slow_rank_is_named_with_its_host_and_by_how_much() -> None:
    assert str(slowest(timings([0.1, 0.1, 0.9, 0.1], [0.002] * 4))) == (
        "rank 2 (node2, cuda:0) took 900.0 ms for waiting for its data, the others 100.0 ms"
    )
    said = str(slowest(timings([0.0] * 4, [0.002, 0.005, 0.002, 0.002])))
    assert said == "rank 1 (node1, cuda:0) took 5.0 ms for a fixed piece of arithmetic, the others 2.0 ms"


@pytest.mark.row(42)
def test_even_ranks_and_noise_are_not_called_slow() -> None:
    assert slowest(timings([0.5, 0.6], [0.002, 0.0025])).percent < 50
    assert slowest(timings([0.001, 0.01], [0.002, 0.002])).percent < 50, "ten times nothing is nothing"


def test_the_slowest_is_known_even_when_nobody_is_slow() -> None:
    worst = slowest(timings([0.5, 0.5, 0.55], [0.002, 0.0021, 0.002]))
    assert (worst.rank, worst.who, worst.what) == (2, "node2, cuda:0", "waiting for its data")
    assert worst.percent == pytest.approx(10)
    quiet = slowest(timings([0.0, 0.001, 0.0], [0.002, 0.002, 0.0022]))
    assert (quiet.rank, quiet.what) == (2, "a fixed piece of arithmetic"), "ten times nothing is nothing"
    assert quiet.percent == pytest.approx(10)


def test_a_look_every_so_many_steps() -> None:
    class Pair:
        world, device = 2, __import__("torch").device("cpu")

        def gather(self, mine: Timing) -> list[Timing]:
            return [mine, Timing(who="node9, cpu", data_s=mine.data_s + 1.0, probe_s=mine.probe_s)]

    run = Told(straggler=StragglerParams(every_steps=3))
    run.guard._engine = Pair()
    for _ in range(3):
        run.step(2.0)
    assert [name for name, _ in run.events] == ["pace", "straggler"]
    pace = run.events[0][1]
    assert (pace["rank"], pace["host"], pace["device"], pace["what"]) == (1, "node9", "cpu", "waiting for its data")
    assert pace["took_ms"] - pace["others_ms"] == pytest.approx(1000)
    assert "rank 1 (node9, cpu)" in run.said[0]
