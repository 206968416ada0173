"""Ticks, thinning and drawing of charts."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as some

from distft.report.charts import MOST_POINTS, Series, decades, line_chart, running_mean, thin, ticks

numbers = some.floats(-1e9, 1e9, allow_nan=False)


@given(numbers, numbers)
def test_ticks_enclose_what_they_measure(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 7
    room = 1e-6 * max(1e-9, found[-1] - found[0])
    assert found[0] <= low + room
    assert found[-1] >= high - room
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0, [-0.0, 1]),
        (1e9 - 1e-7, 1e9, [9e8, 1.1e9]),
        (0, 5e-324, [0, 1]),
        (1.7, 2.4, [1.6, 1.8, 2.0, 2.2, 2.4]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high, 4)
    assert (found[0], found[-1]) == pytest.approx((expected[0], expected[-1]), abs=1e-9)


@given(some.floats(1e-6, 1e6), some.floats(1, 1e5))
def test_decades_enclose_what_they_measure(low: float, times: float) -> None:
    found = decades(low, low * times, 4)
    assert found[0] <= low * (1 + 1e-6)
    assert found[-1] >= low * times * (1 - 1e-6)


def test_thinning_keeps_few_points_with_the_means() -> None:
    points = [(float(at), float(at % 10)) for at in range(10_000)]
    few = thin(points)
    assert len(few) == MOST_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(4.5)
    assert thin(points[:5]) == points[:5]


def test_a_running_mean_leaves_the_ends_and_straight_lines_alone() -> None:
    points = [(float(at), 2.0 * at) for at in range(200)]
    assert [y for _, y in running_mean(points)] == pytest.approx([y for _, y in points])


def test_no_points_no_chart() -> None:
    assert line_chart("Loss", [Series(name="a", points=[])], says="nothing") is None


@pytest.mark.parametrize("points", [[(1, 5.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 1e9)], [(3, -2.0), (4, -2.0)]])
@pytest.mark.parametrize("kind", ["line", "noisy", "dots", "level"])
def test_any_points_lie_inside(points: list[tuple[float, float]], kind: str) -> None:
    drawn = line_chart("Loss", [Series(name="a", points=points, kind=kind)], says="something")
    assert drawn is not None
    places = [float(x) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawn) for x in pair]
    places += [float(y) for y in re.findall(r'y[12]="(-?[\d.]+)"', drawn)]
    assert all(0 <= place <= 1000 for place in places)
