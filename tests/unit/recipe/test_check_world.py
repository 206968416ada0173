"""A global batch splits evenly over processes, or the message lists what would."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distft.core.errors import RecipeError
from distft.recipe import Recipe, check_world

Parse = Callable[..., Recipe]


def test_counts_micro_batches(parse: Parse, minimal: str) -> None:
    assert check_world(parse(minimal), 8) == 8
    assert check_world(parse(minimal), 8, micro_batch_size=2) == 4
    assert check_world(parse(minimal + "[train]\nmicro_batch_size = 4\n"), 8) == 2


@pytest.mark.row(17)
def test_lists_what_fits(parse: Parse, minimal: str) -> None:
    recipe = parse(minimal + "[train]\nglobal_batch_size = 48\n")
    with pytest.raises(RecipeError) as caught:
        check_world(recipe, 6, micro_batch_size=5)
    (problem,) = caught.value.problems
    assert problem.line == 7
    assert "48 sequences do not split evenly over 6 processes x micro_batch_size 5" in str(problem)
    assert "micro batch sizes that fit 6: 1, 2, 4, 8" in str(problem)
    assert "or global_batch_size = 30 or 60" in str(problem)


@pytest.mark.row(17)
def test_lists_world_sizes(parse: Parse, minimal: str) -> None:
    with pytest.raises(RecipeError, match=r"numbers of processes that fit: 1, 2, 4, 8, 16, 32, 64; "):
        check_world(parse(minimal), 6)
