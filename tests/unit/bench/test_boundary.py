"""The bisection: finds every boundary, tries each size once, and says so when there is none."""

from pathlib import Path
from typing import Any

import pytest
from bench_kit import became, wanted

from distft.bench import boundary
from distft.bench.boundary import bisect
from distft.bench.cases import BenchCase
from distft.bench.runner import Runner
from distft.catalog import REGISTRIES
from distft.core.errors import MachineError
from distft.recipe import load_recipe


@pytest.mark.parametrize("first", [1, 4, 32])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 1000])
def test_every_boundary_is_found(limit: int, first: int) -> None:
    found = bisect(lambda size: size <= limit, first)
    assert (found.largest, found.smallest_too_large) == (limit or None, limit + 1)
    sizes = [size for size, _ in found.tries]
    assert len(sizes) == len(set(sizes)) <= 2 * 10 + 2
    assert all(ran == (size <= limit) for size, ran in found.tries)


def test_lengths_are_found_to_within_a_unit() -> None:
    found = bisect(lambda tokens: tokens <= 1000, 256, unit=64)
    assert (found.largest, found.smallest_too_large) == (960, 1024)
    assert all(size % 64 == 0 for size, _ in found.tries)


def test_without_a_limit_it_ends() -> None:
    found = bisect(lambda size: True, 1)
    assert found.smallest_too_large is None
    assert found.largest == 2 ** (boundary.MOST_DOUBLINGS - 1)


def searched(folder: Path, axis: str, outcome: Any, **asked: Any) -> tuple[dict[str, Any], list[BenchCase]]:
    asked_for = wanted(folder, engines=("solo",), **asked)
    own = load_recipe(asked_for.recipe, registries=REGISTRIES)
    seen: list[BenchCase] = []

    def run(case: BenchCase, at: Path) -> dict[str, Any]:
        seen.append(case)
        said = outcome(case)
        return became(case) if said == "measured" else {"outcome": said, "reason": "because"}

    shown, _ = boundary.search(Runner(folder / "out", run, lambda line: None), asked_for, own, axis, lambda line: None)
    return shown, seen


def test_each_try_is_a_case_of_full_rows_and_two_micro_batches(tmp_path: Path) -> None:
    def fits(case: BenchCase) -> str:
        return "measured" if int(case.micro_batch_size) <= 5 else "memory"

    shown, seen = searched(tmp_path, "micro", fits, lengths=(64,), limit_gib=2.0)
    assert (shown["largest"], shown["smallest_too_large"]) == (5, 6)
    assert shown["found"] == "micro-batch 5 runs, 6 does not"
    assert "2 GiB of private memory" in shown["limit"]
    for case in seen:
        assert (case.rows, case.steps, case.limit_gib) == ("full", 5, 2.0)
        assert case.content["train"]["global_batch_size"] == 2 * int(case.micro_batch_size)
    again, repeated = searched(tmp_path, "micro", fits, lengths=(64,), limit_gib=2.0)
    assert again == shown
    assert not repeated, "a search that was stopped goes on where it was"


def test_what_is_not_memory_is_no_boundary(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="because"):
        searched(tmp_path, "length", lambda case: "failed", lengths=(64,))
    shown, _ = searched(
        tmp_path, "length", lambda case: "measured" if case.max_length < 256 else "refused", lengths=(64,)
    )
    assert shown["largest"] == 128
    assert shown["smallest_too_large"] is None
    assert shown["found"].endswith("; because")
