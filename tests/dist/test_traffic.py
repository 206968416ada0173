"""A step sends what its engine needs and no more, and the host waits for the accelerator once or twice in it.

Counted in running processes by `benchmarks/scaling.py`, against the planner's formulas; one launch per world size.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, run

pytestmark = pytest.mark.slow  # make test counts the same on a fake group: test_collectives.py
Row = dict[str, Any]


def counted(out: Path, worlds: list[str], methods: list[str], dtypes: list[str]) -> list[Row]:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--worlds", *worlds, "--out", str(out)]
    command += ["--methods", *methods, "--dtypes", *dtypes]
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return counted(tmp_path_factory.mktemp("traffic") / "rows.json", ["1", "2"], ["full"], ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def rows_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return counted(tmp_path_factory.mktemp("traffic") / "rows.json", ["4"], ["full", "lora"], ["float32"])


@pytest.fixture(scope="module")
def rows_of_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return counted(tmp_path_factory.mktemp("traffic") / "rows.json", ["2"], ["full", "lora"], ["float32", "bfloat16"])


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert found
    return found


def name(row: Row) -> str:
    return f"{row['engine']} x {row['world']} {row['method']} {row['dtype']} {row['micros']}"


def test_a_step_sends_what_the_planner_says(rows: list[Row]) -> None:
    as_planned(rows)


def test_groups_of_two_send_what_the_planner_says(rows_of_four: list[Row]) -> None:
    as_planned(rows_of_four)
    whole, halves = (
        of(rows_of_four, engine=engine, method="full", micros=2)[0]["sent_bytes"]
        for engine in ("zero3", "zero3 engine.shard_within=2")
    )
    assert halves < whole, "the backward pass gathers inside a group"


def test_adapters_send_what_the_planner_says(rows_of_adapters: list[Row]) -> None:
    as_planned(rows_of_adapters)
    for dtype in ("float32", "bfloat16"):
        once_a_step(of(rows_of_adapters, dtype=dtype), "lora")


def as_planned(rows: list[Row]) -> None:
    """To 2 %: padding. zero3 keeps what it gathered last, so it sends less than gathers for both passes."""
    for row in rows:
        if row["world"] == 1:
            assert row["tensor_collectives"] == row["control_collectives"] == 0, name(row)
            continue
        share = row["sent_bytes"] / row["theory_bytes"]
        least = 0.6 if row["engine"].startswith("zero3") else 0.98
        assert least <= share <= 1.02, (name(row), share)


def test_accumulation_adds_nothing_where_gradients_meet_once(rows: list[Row]) -> None:
    for dtype in ("float32", "bfloat16"):
        once_a_step(of(rows, dtype=dtype), "full")


def once_a_step(rows: list[Row], method: str) -> None:
    for engine in ("ddp", "zero1", 'fsdp2 engine.gather="once_a_step"'):
        one, two = (of(rows, world=2, engine=engine, method=method, micros=micros)[0] for micros in (1, 2))
        assert one["sent_bytes"] == two["sent_bytes"]
        assert one["tensor_collectives"] == two["tensor_collectives"]


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.4), ("bfloat16", 0.42)])
def test_gathering_once_a_step_saves_most_of_two_micro_batches(rows: list[Row], dtype: str, share: float) -> None:
    """In bf16 weights are gathered in 2 bytes and gradients add up in 4: 0.413 by plan."""
    once, each = (
        of(rows, world=2, engine=engine, method="full", dtype=dtype, micros=2)[0]["sent_bytes"]
        for engine in ('fsdp2 engine.gather="once_a_step"', "fsdp2")
    )
    assert once < share * each


def test_no_micro_batch_adds_a_collective_or_a_wait_of_ours(rows: list[Row]) -> None:
    """Counts, losses and norms travel once a step, however many micro-batches it has; so is the host kept waiting."""
    for row in rows:
        case = {key: row[key] for key in ("world", "engine", "method", "dtype")}
        first = of(rows, **case, micros=1)[0]
        if row["dtype"] == "float32":
            assert row["control_collectives"] == first["control_collectives"], name(row)
        else:  # with one bf16 micro-batch DDP itself sends a few bytes more than with several
            assert row["control_collectives"] <= first["control_collectives"], name(row)
        assert row["host_waits"] == first["host_waits"], (name(row), row["waits_at"])
        if not row["engine"].startswith("zero"):
            assert row["control_collectives"] <= 3, name(row)
            assert row["host_waits"] <= 2, (name(row), row["waits_at"])
