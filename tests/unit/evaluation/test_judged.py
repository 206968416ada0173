"""Held-out rows that judge answers: figures against sums made by hand, and what is said of a gain."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from distft.evaluation.judged import FALLS_FAR, judged_figures, judged_warnings


def pair(gap: float, longer: int = 0, **more: float) -> dict[str, Any]:
    """Rewards `gap` apart; the rejected answer has 4 tokens, the chosen one `longer` more."""
    return {"reward_chosen": 1.0 + gap, "reward_rejected": 1.0, "tokens_chosen": 4.0 + longer, "tokens_rejected": 4.0,
            **more}  # fmt: skip


def answer(ahead: float, desirable: bool, logprob: float = -2.0, tokens: float = 4.0) -> dict[str, Any]:
    return {"ahead": ahead, "desirable": float(desirable), "reward": ahead if desirable else -ahead,
            "logprob": logprob, "tokens": tokens}  # fmt: skip


def confidence(gap: float) -> float:
    return 1 / (1 + math.exp(-abs(gap)))


class TestPairs:
    ROWS = (pair(2.0, 3), pair(0.1, 0), pair(-0.2, -2), pair(0.0, 1), pair(3.0, 3))

    def test_accuracy_is_wilsons_share_and_a_tie_is_half(self) -> None:
        made = judged_figures(self.ROWS)
        assert (made["kind"], made["rows"]) == ("pairs", 5)
        n, z2, share = 5, 1.959963984540054**2, 3.5 / 5
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
        assert made["accuracy"]["value"] == pytest.approx(share)
        assert (made["accuracy"]["low"], made["accuracy"]["high"]) == pytest.approx((middle - half, middle + half))
        json.dumps(made)

    def test_margin_lengths_and_their_correlation(self) -> None:
        made = judged_figures(self.ROWS)
        gaps, longer = [2.0, 0.1, -0.2, 0.0, 3.0], [3, 0, -2, 1, 3]
        assert made["margin"]["value"] == pytest.approx(sum(gaps) / 5)
        assert made["margin"]["low"] < sum(gaps) / 5 < made["margin"]["high"]
        assert made["tokens"] == {"chosen": pytest.approx(5.0), "rejected": 4.0}
        mean_gap, mean_longer = sum(gaps) / 5, sum(longer) / 5
        covariance = sum((g - mean_gap) * (n - mean_longer) for g, n in zip(gaps, longer, strict=True))
        spread = math.sqrt(sum((g - mean_gap) ** 2 for g in gaps) * sum((n - mean_longer) ** 2 for n in longer))
        assert made["length_correlation"] == pytest.approx(covariance / spread)
        assert judged_figures([pair(1.0), pair(2.0)])["length_correlation"] is None, "lengths that do not vary"
        assert "logprob_per_token" not in made, "a reward model gives no log-probabilities"

    def test_calibration_is_the_mean_distance_of_confidence_and_accuracy(self) -> None:
        made = judged_figures(self.ROWS)["calibration"]
        low = [confidence(gap) for gap in (0.1, -0.2, 0.0)]  # below 0.6: right, wrong, a tie
        high = [confidence(gap) for gap in (2.0, 3.0)]  # 0.88 and 0.95: one bin each
        by_hand = [(sum(low) / 3, 0.5, 3), (high[0], 1.0, 1), (high[1], 1.0, 1)]
        assert [tuple(each.values()) for each in made["bins"]] == [pytest.approx(each) for each in by_hand]
        assert made["error"] == pytest.approx(sum(n * abs(c - a) for c, a, n in by_hand) / 5)
        assert judged_figures([pair(5000.0), pair(-5000.0)])["calibration"]["error"] == pytest.approx(0.5)

    def test_groups_of_length_and_margin(self) -> None:
        rows = [pair(1.0 if n % 2 else -1.0, n - 4, margin=float(n)) for n in range(1, 10)]
        groups = judged_figures(rows)["groups"]
        assert {key: (group["value"], group["num_rows"]) for key, group in groups["length"].items()} == {
            "shorter": (pytest.approx(2 / 3), 3), "equal": (0.0, 1), "longer": (pytest.approx(3 / 5), 5),
        }  # fmt: skip
        assert {key: (group["value"], group["num_rows"]) for key, group in groups["margin"].items()} == {
            "small": (pytest.approx(2 / 3), 3), "middle": (pytest.approx(1 / 3), 3), "large": (pytest.approx(2 / 3), 3)
        }  # fmt: skip
        assert set(judged_figures(self.ROWS)["groups"]) == {"length"}, "no row has a margin"

    def test_logprobs_per_token_are_of_all_tokens(self) -> None:
        rows = [pair(1.0, 0, logprob_chosen=-4.0, logprob_rejected=-8.0),
                pair(1.0, 12, logprob_chosen=-4.0, logprob_rejected=-8.0)]  # fmt: skip
        assert judged_figures(rows)["logprob_per_token"] == {"chosen": -8 / 20, "rejected": -16 / 8}


def test_single_answers() -> None:
    rows = [answer(1.0, True), answer(-1.0, True, tokens=12.0), answer(0.5, False), answer(0.0, False)]
    made = judged_figures(rows)
    assert (made["kind"], made["accuracy"]["value"]) == ("answers", 2.5 / 4)
    assert {key: group["value"] for key, group in made["groups"]["label"].items()} == {"good": 0.5, "bad": 0.75}
    assert made["tokens"] == {"good": 8.0, "bad": 4.0}
    assert made["logprob_per_token"] == {"good": -4 / 16, "bad": -4 / 8}
    assert made["reward"] == {"good": 0.0, "bad": -0.25}
    one_sided = judged_figures([answer(1.0, False)])
    assert set(one_sided["tokens"]) == {"bad"}, "there is no good answer to tell of"
    assert judged_warnings(one_sided, one_sided) == []


class TestWarnings:
    def gained(self, longer: int, shorter: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(before, after) of 40 pairs each way, of which so many more are right than the half."""
        before = [pair(1.0 if n % 2 else -1.0, side) for side in (1, -1) for n in range(40)]
        more = {1: longer, -1: shorter}
        after = [pair(1.0 if n < 20 + more[side] else -1.0, side) for side in (1, -1) for n in range(40)]
        return judged_figures(before), judged_figures(after)

    def fallen(self, by: float) -> tuple[dict[str, Any], dict[str, Any]]:
        was, now = (
            [pair(1.0, 0, logprob_chosen=-4.0 - 4.0 * each, logprob_rejected=-8.0)] for each in (0.0, by)
        )  # 4 tokens
        return judged_figures(was), judged_figures(now)

    def test_all_gain_is_length(self) -> None:
        (said,) = judged_warnings(*self.gained(15, -2))
        assert said.startswith("all of the gain in accuracy is length: +0.375 where the chosen answer is the longer")
        assert "-0.050 where it is the shorter one" in said
        assert "sigmoid_norm" in said, "and what to do"

    def test_a_gain_on_both_sides_or_by_chance_or_none_is_not_warned_of(self) -> None:
        assert judged_warnings(*self.gained(15, 1)) == []
        assert judged_warnings(*self.gained(1, -2)) == [], "one of forty rows is chance"
        assert judged_warnings(*self.gained(-3, -3)) == []
        assert judged_warnings(*self.gained(-2, 15)) == [], "shorter answers win: not by length"

    def test_chosen_answers_fall(self) -> None:
        (said,) = judged_warnings(*self.fallen(2 * FALLS_FAR))
        assert said.startswith("chosen answers have become unlikelier: -1.000 to -1.200 nats per token")
        assert "sft_weight" in said
        assert judged_warnings(*self.fallen(0.5 * FALLS_FAR)) == []
        assert judged_warnings(*self.fallen(-1.0)) == []

    def test_good_answers_fall(self) -> None:
        was, now = ([answer(1.0, True, logprob), answer(1.0, False)] for logprob in (-2.0, -4.0))
        (said,) = judged_warnings(judged_figures(was), judged_figures(now))
        assert said.startswith("good answers have become unlikelier: -0.500 to -1.000")
        assert "desirable_weight" in said

    def test_both(self) -> None:
        was, now = self.gained(15, -2)
        fell = self.fallen(1.0)
        was, now = ({**one, "logprob_per_token": two["logprob_per_token"]} for one, two in zip((was, now), fell,
                                                                                              strict=True))  # fmt: skip
        assert [said.split()[0] for said in judged_warnings(was, now)] == ["all", "chosen"]

    def test_nothing_to_hold_against(self) -> None:
        was, now = self.fallen(1.0)
        assert judged_warnings(None, now) == judged_warnings(was, None) == []
        assert judged_warnings(was, judged_figures([answer(1.0, True)])) == []
