"""What records become: voided rows, ratios, planned beside measured, and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_kit import became, cases

from distft.bench import plots, table
from distft.bench.cases import BenchCase
from distft.bench.loss_agreement import judge
from distft.bench.planned import Planning
from distft.bench.runner import Runner


def records(folder: Path, changed: Any = lambda case: {}, **asked: Any) -> tuple[list[BenchCase], list[dict[str, Any]]]:
    listed = cases(folder, **asked)
    runner = Runner(folder / "out", lambda case, at: became(case, **changed(case)), lambda line: None)
    return listed, runner.all(listed)


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ][2:]


def test_a_case_that_learns_something_else_is_void(tmp_path: Path) -> None:
    fp32 = ('model.dtype="float32"',)
    _, found = records(
        tmp_path,
        lambda case: {"loss": (3.0, 2.5 * (1 + 3e-5 * (case.micro_batch_size == 2)), 2.0)},
        micros=(1, 2),
        engines=("solo",),
        overrides=fp32,
    )
    first, second = judge(found)
    assert first["loss_check"]["equal"]
    assert not second["loss_check"]["equal"]
    assert second["loss_check"]["early"] == pytest.approx(3e-5)
    shown = rows(table.markdown("bench", [first, second]))
    assert shown[1][4:6] == ["void", "–"]
    assert "VOID: its losses differ from" in shown[1][-1]
    assert "VOID" not in shown[0][-1]
    assert "Losses: 1 compared with another" in table.markdown("bench", [first, second])
    assert "none was compared" in table.markdown("bench", [first])


@pytest.mark.parametrize(
    ("overrides", "apart", "equal"),
    [
        (('model.dtype="float32"',), 0.9e-5, True),
        (('model.dtype="bfloat16"',), 3e-3, True),
        (('model.dtype="bfloat16"',), 3e-2, False),
        (('model.dtype="float32"', 'optim.name="adamw_8bit"'), 3e-3, True),
    ],
)
def test_the_tolerance_is_that_of_the_arithmetic(
    tmp_path: Path, overrides: tuple[str, ...], apart: float, equal: bool
) -> None:
    _, found = records(
        tmp_path, lambda case: {"loss": (1.0 + apart * (case.engine == "ddp"),)}, engines=("ddp", "solo"),
        overrides=overrides,
    )  # fmt: skip
    checks = [record["loss_check"] for record in judge(found)]
    assert [check["equal"] for check in checks] == [equal, True]
    assert "solo" in checks[0]["reference"], "the reference is the plain engine, wherever it stands in the list"


def test_another_global_batch_is_another_curve(tmp_path: Path) -> None:
    _, small = records(tmp_path, lambda case: {"loss": (1.0,)})
    _, large = records(tmp_path, lambda case: {"loss": (2.0,)}, overrides=("train.global_batch_size=16",))
    assert all(record["loss_check"]["equal"] for record in judge([*small, *large]))


def test_a_step_left_out_voids_the_row(tmp_path: Path) -> None:
    _, found = records(tmp_path, lambda case: {"left_out": 1})
    assert not judge(found)[0]["loss_check"]["equal"]


def test_under_dropout_only_equal_micro_batches_are_compared(tmp_path: Path) -> None:
    _, found = records(
        tmp_path, lambda case: {"loss": (float(case.micro_batch_size),)}, methods=("lora",), micros=(1, 2),
        overrides=('method={name="lora", dropout=0.1}',),
    )  # fmt: skip
    assert all(record["loss_check"]["equal"] for record in judge(found))


def test_ratios_are_to_full_fine_tuning_otherwise_alike(tmp_path: Path) -> None:
    slow = {"full": 0.2, "lora": 0.1}
    _, found = records(
        tmp_path, lambda case: {"step_s": slow[case.method] * case.micro_batch_size}, methods=("lora", "full"),
        micros=(1, 2),
    )  # fmt: skip
    assert [row[5] for row in rows(table.markdown("bench", judge(found)))] == ["2.00", "2.00", "1.00", "1.00"]


def test_failures_are_rows_with_their_reason(tmp_path: Path) -> None:
    listed = cases(tmp_path, micros=(1, 3), engines=("solo",))
    out = {"outcome": "memory", "reason": "tried to allocate 4 bytes"}
    found = Runner(tmp_path / "out", lambda case, at: out, lambda line: None).all(listed)
    planned = [Planning().beside(case, record) for case, record in zip(listed, found, strict=True)]
    memory, refused = rows(table.markdown("bench", judge(planned)))
    assert memory[-1] == "out of memory: tried to allocate 4 bytes"
    assert memory[8].endswith("iB"), "what was planned is what one wants to know of it"
    assert refused[-1].startswith("not possible: ")


def test_planned_stands_beside_measured(tmp_path: Path) -> None:
    listed, found = records(tmp_path, engines=("solo",), methods=("full",), lengths=(64,))
    record = Planning().beside(listed[0], found[0])
    numbers = record["planned"]["per_rank"]["weights_bytes"]
    assert numbers == record["planned"]["state_by_rank"][0]["weights_bytes"] > 0
    row = rows(table.markdown("bench", [record]))[0]
    assert row[7] == "40.0 MiB"
    assert row[9].endswith("%")
    assert row[11] == "3,500"
    assert "state differs from the plan on rank 0" in row[-1], "made-up bytes are not those of the model"


def test_an_interrupted_block_is_named(tmp_path: Path) -> None:
    _, found = records(tmp_path)
    found[0]["speed"]["block_tokens_per_s"] = 100.0
    text = table.markdown("bench", found)
    assert "unsteady: interruptions left the whole block 1% of this rate" in text


def test_a_table_for_other_machines_has_ratios_and_bytes(tmp_path: Path) -> None:
    _, found = records(tmp_path)
    whole, kept = (table.markdown("bench", found, times=times) for times in (True, False))
    assert "| tokens/s |" in whole
    assert "10,000" in whole
    assert "10,000" not in kept
    assert "100.0 [" not in kept
    assert rows(kept)[0][4] == "1.00"


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    listed, found = records(tmp_path, methods=("full", "lora"), lengths=(64, 128), engines=("solo",))
    planned = judge([Planning().beside(case, record) for case, record in zip(listed, found, strict=True)])
    drawn = plots.draw(json.loads(json.dumps(planned)), tmp_path)
    assert [path.name for path in drawn] == ["memory-by-component.svg", "tokens-per-s.svg", "memory-by-length.svg"]
    component, speed, length = (path.read_text() for path in drawn)
    for word in ("weights", "optimizer", "activations and rest", "lora solo, m 1, 128"):
        assert word in component
    assert "10,000" in speed
    assert "solo, micro-batch 1" in length
    parts = plots.components(planned[0])
    assert sum(measured for _, measured in parts.values()) == 40 * 2**20, "the bars end at the measured peak"


def test_without_results_there_is_no_picture(tmp_path: Path) -> None:
    assert plots.draw([], tmp_path) == []
