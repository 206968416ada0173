"""Intervals and tests: against scipy and statsmodels where installed, known figures elsewhere, and what must hold."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.scores import MetricInfo, ScoreResult
from distft.scores.confidence_intervals import of_difference, of_mean, of_share
from distft.scores.paired import compare, mcnemar, regressions

SKEWED = [float(value) for value in np.random.default_rng(3).exponential(size=80)]
rows = st.lists(st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3)), min_size=2, max_size=60)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)


class TestBootstrap:
    def test_agrees_with_scipys_bca(self) -> None:
        stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
        for data in (SKEWED, [0.0] * 70 + [1.0] * 10):
            found = of_mean(data, resamples=40_000)
            theirs = stats.bootstrap(
                (np.array(data),), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(1)
            ).confidence_interval
            width = theirs.high - theirs.low
            assert found.low == pytest.approx(theirs.low, abs=0.03 * width)
            assert found.high == pytest.approx(theirs.high, abs=0.03 * width)

    def test_leans_where_the_data_leans(self) -> None:
        found = of_mean(SKEWED)
        assert found.high - found.value > found.value - found.low

    @settings(max_examples=40, deadline=None)
    @given(rows)
    def test_holds_the_mean_and_repeats(self, values: list[float]) -> None:
        found = of_mean(values, resamples=500)
        assert found.low <= found.value + 1e-9
        assert found.value - 1e-9 <= found.high
        assert min(values) - 1e-9 <= found.low
        assert found.high <= max(values) + 1e-9
        assert found == of_mean(values, resamples=500)

    @settings(max_examples=40, deadline=None)
    @given(rows, rows)
    def test_a_difference_mirrors(self, before: list[float], after: list[float]) -> None:
        count = min(len(before), len(after))
        forth = of_difference(before[:count], after[:count], resamples=500)
        back = of_difference(after[:count], before[:count], resamples=500)
        assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-6)

    @pytest.mark.parametrize(
        "draw",
        [
            lambda random, n: random.normal(0.3, 1, n),
            lambda random, n: random.choice([-1.0, 0.0, 1.0], n, p=[0.1, 0.5, 0.4]),
            lambda random, n: random.exponential(0.3, n),
        ],
        ids=["normal", "gains and losses", "skewed"],
    )
    def test_covers_the_truth_as_often_as_it_says(self, draw) -> None:
        """True mean 0.3 in each. 400 samples of 60 rows: 95 % +- 2.2; the bootstrap is known to be a little narrow."""
        random = np.random.default_rng(0)
        found = [of_mean(draw(random, 60), resamples=400, seed=at) for at in range(400)]
        assert 0.90 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.985

    def test_too_few_rows_have_no_interval(self) -> None:
        assert math.isnan(of_mean([]).value)
        one = of_mean([0.25])
        assert (one.value, one.method, one.num_rows) == (0.25, "none", 1)
        assert math.isnan(one.low)
        assert not one.excludes_zero

    def test_equal_rows_have_one_of_no_width(self) -> None:
        found = of_mean([0.1] * 9)
        assert (found.low, found.value, found.high) == (0.1, 0.1, 0.1)
        assert not of_difference([1.0, 0.0], [1.0, 0.0]).excludes_zero

    def test_rows_without_a_score_do_not_count(self) -> None:
        assert of_mean([1.0, math.nan, 0.0, 0.5], seed=4) == of_mean([1.0, 0.0, 0.5], seed=4)
        assert of_difference([1.0, math.nan, 0.0], [0.0, 1.0, 1.0]).num_rows == 2

    def test_pairs_must_be_pairs(self) -> None:
        with pytest.raises(ValueError, match="2 rows before and 1 after"):
            of_difference([0.0, 1.0], [1.0])

    def test_pairing_sees_what_two_intervals_would_not(self) -> None:
        before = [float(value) for value in np.random.default_rng(0).normal(size=100)]
        after = [value + 0.05 for value in before]
        assert of_difference(before, after).excludes_zero
        assert of_mean(before).high > of_mean(after).low


class TestWilson:
    def test_known_figures(self) -> None:
        """Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258), table I, method 3."""
        for successes, count, low, high in (
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ):
            found = of_share(successes, count)
            assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))

    @given(st.integers(0, 500), st.integers(0, 500))
    def test_mirrors_and_stays_inside(self, right: int, wrong: int) -> None:
        one, other = of_share(right, right + wrong), of_share(wrong, right + wrong)
        if right + wrong == 0:
            assert math.isnan(one.value)
            return
        assert one.low == pytest.approx(1 - other.high, abs=1e-12)
        assert 0 <= one.low <= one.value <= one.high <= 1


class TestMcNemar:
    @settings(max_examples=60)
    @given(outcomes)
    def test_agrees_with_the_coin(self, pairs: list[tuple[bool, bool]]) -> None:
        before, after = [float(old) for old, _ in pairs], [float(new) for _, new in pairs]
        found = mcnemar(before, after)
        flips, few = found.gained + found.lost, min(found.gained, found.lost)
        tail = sum(math.comb(flips, k) for k in range(few + 1)) / 2**flips
        assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
        assert mcnemar(after, before).p_value == found.p_value

    def test_agrees_with_statsmodels_also_for_thousands(self) -> None:
        tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
        draw = random.Random(0)
        for gained, lost in [
            (0, 0),
            (1, 0),
            (10, 2),
            (40, 40),
            (1500, 1400),
            *[(draw.randrange(99), draw.randrange(99))],
        ]:
            before, after = [0.0] * gained + [1.0] * lost + [1.0], [1.0] * gained + [0.0] * lost + [1.0]
            theirs = tables.mcnemar([[1, lost], [gained, 0]], exact=True).pvalue
            assert mcnemar(before, after).p_value == pytest.approx(theirs, rel=1e-9)

    def test_known_figures(self) -> None:
        """10 gained, 2 lost: 2 x (1 + 12 + 66) / 4096."""
        found = mcnemar([0.0] * 10 + [1.0] * 2 + [math.nan], [1.0] * 10 + [0.0] * 2 + [1.0])
        assert (found.gained, found.lost) == (10, 2)
        assert found.p_value == pytest.approx(158 / 4096)
        assert mcnemar([], []).p_value == 1.0


class TestCompare:
    FIGURE = MetricInfo(name="exact_match", binary=True)

    def scored(self, values: list[float], figure: MetricInfo = FIGURE) -> ScoreResult:
        return ScoreResult(
            figures=(figure,), rows={figure.name: tuple(values)}, totals={figure.name: float(np.mean(values))}
        )

    def test_says_better_only_when_it_can(self) -> None:
        before = [0.0] * 30 + [1.0] * 10
        (change,) = compare(self.scored(before), self.scored([1.0] * 12 + [0.0] * 18 + [1.0] * 10))
        assert change.verdict == "better"
        assert (change.before.method, change.difference.method) == ("wilson", "bca")
        assert change.difference.value == pytest.approx(0.3)
        (change,) = compare(self.scored(before), self.scored([1.0] * 2 + [0.0] * 28 + [1.0] * 10))
        assert change.verdict == "no clear change"
        (change,) = compare(self.scored([1.0] * 12 + [0.0] * 28), self.scored([0.0] * 40))
        assert change.verdict == "worse"
        assert [one.index for one in change.regressions] == list(range(12))

    def test_lower_may_be_better(self) -> None:
        loss = MetricInfo(name="loss", higher_is_better=False)
        old = [float(value) for value in np.random.default_rng(0).uniform(1, 3, 50)]
        (change,) = compare(self.scored(old, loss), self.scored([value - 0.2 for value in old], loss))
        assert change.verdict == "better"
        assert change.mcnemar is None
        assert change.regressions == ()
        assert change.to_json()["verdict"] == "better"

    def test_a_figure_of_the_corpus_alone_has_no_interval(self) -> None:
        bleu = MetricInfo(name="bleu", per_row=False)
        before, after = (ScoreResult(figures=(bleu,), rows={}, totals={"bleu": value}) for value in (10.0, 30.0))
        (change,) = compare(before, after)
        assert (change.difference.value, change.difference.method, change.verdict) == (20.0, "none", "no clear change")

    def test_other_figures_are_no_pair(self) -> None:
        with pytest.raises(ValueError, match="different figures"):
            compare(self.scored([1.0]), self.scored([1.0], MetricInfo(name="f1")))


def test_regressions_come_worst_first() -> None:
    found = regressions([1.0, 0.5, 0.9, 0.2, math.nan], [0.9, 0.5, 0.1, 0.4, 0.0])
    assert [(one.index, round(one.worse_by, 3)) for one in found] == [(2, 0.8), (0, 0.1)]
    assert [one.index for one in regressions([1.0, 2.0], [1.5, 1.0], higher_is_better=False)] == [0]
