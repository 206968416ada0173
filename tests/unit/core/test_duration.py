"""Durations have two units at most."""

import pytest

from distft.core.duration import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.7, "1 h 00 min"),
        (7384, "2 h 03 min"),
        (47 * 3600 + 3599, "47 h 59 min"),
        (51 * 3600 + 61, "2 d 03 h"),
    ],
)
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_page_does_not_break_between_number_and_unit() -> None:
    assert duration(250, space="\u202f") == "4\u202fmin 10\u202fs"
