"""What eight ranks send in a step, counted on the real libraries over a process group that carries nothing.

Bytes are the planner's, whose figures for an 8B model stand below as a written budget; calls have a budget of their
own, for each block and for the rest. A change that gathers a block once more, or reduces in another type, fails here.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, WHOLE_GRIDS, run

Row = dict[str, Any]
ONCE = {"gather": "once_a_step"}
HALVES = {"shard_within": 4}
DEPTHS = (4, 6)
METHODS = {
    # engine: methods; those of engines whose weights are whole send the same kinds for each
    "ddp": ("full", "qlora"),
    "zero1": ("full",),
    "zero2": ("full",),
    "zero3": (),  # full has two micro-batches below
    "fsdp2": ("qlora",),
}
CASES = [
    # engine, method, micro-batches, settings
    *(
        (engine, method, 2 if engine == "ddp" else 1, {})
        for engine, some in METHODS.items()
        for method in (("full", "lora", "qlora") if WHOLE_GRIDS else some)
    ),
    *((engine, "full", 2, {}) for engine in ("zero1", "zero3", "fsdp2", *(("zero2",) if WHOLE_GRIDS else ()))),
    ("fsdp2", "full", 2, ONCE),
    ("fsdp2", "full", 2, HALVES),
    ("zero3", "full", 2, HALVES),
]


def counted(folder: Path, chosen: Iterable[tuple[str, str, int, dict[str, Any]]], **more: str) -> list[tuple[Row, Row]]:
    """Each case at two depths; one process for all."""
    out = folder / "rows.json"
    cases = [
        {"engine": engine, "method": method, "layers": layers, "micros": micros, "settings": settings} | more
        for engine, method, micros, settings in chosen
        for layers in DEPTHS
    ]
    done = run(
        [sys.executable, str(ROOT / "tests/helpers/collectives.py"), json.dumps(cases), str(out)],
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests/helpers'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(out.read_text())
    return list(zip(made[::2], made[1::2], strict=True))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Row, Row]]:
    return counted(tmp_path_factory.mktemp("collectives"), CASES)


def test_bytes_are_the_planners(rows: list[tuple[Row, Row]]) -> None:
    for short, deep in rows:
        about = (short["engine"], short["method"], short["settings"])
        blocks = DEPTHS[1] - DEPTHS[0]
        sent, planned = ((deep[key] - short[key]) / blocks for key in ("sent", "planned"))
        assert sent == pytest.approx(planned, rel=0.02 if short["settings"] == HALVES else 1e-3), ("a block", about)
        if short["engine"] == "zero3":  # keeps what it gathered last, whatever the depth
            assert 0 <= deep["planned"] - deep["sent"] < 2 * deep["planned"] / DEPTHS[1], about
        else:
            assert deep["sent"] == pytest.approx(deep["planned"], rel=1e-3), about


BLOCK = {"full": (2, 1), "lora": (2, 1), "qlora": (2, 1)}
"""fsdp2's gathers and reductions of a block in a micro-batch."""
ENDS = {"full": (3, 3), "lora": (3, 0), "qlora": (3, 0)}
"""Those of embedding, head and last norm together."""


@pytest.mark.slow
def test_a_critic_of_its_own_is_gathered_and_reduced_as_planned(tmp_path: Path) -> None:
    """Two rows of blocks: a layer more is a block of each, the critic's trained under every method."""
    kinds = [(engine, method) for engine in ("zero3", "fsdp2") for method in ("full", "lora")]
    rows = counted(tmp_path, [(*kind, 1, {}) for kind in kinds], head="lm_critic")
    for short, deep in rows:
        sent, planned = ((deep[key] - short[key]) / (DEPTHS[1] - DEPTHS[0]) for key in ("sent", "planned"))
        assert sent == pytest.approx(planned, rel=1e-3), (short["engine"], short["method"])
        if short["engine"] == "fsdp2":
            assert deep["sent"] == pytest.approx(deep["planned"], rel=1e-3), short["method"]


def test_fsdp2_gathers_a_block_twice_and_the_ends_once(rows: list[tuple[Row, Row]]) -> None:
    """For forward and backward; gathered once a step, all once. Groups of ranks meet once a step for each unit."""
    for row in (row for pair in rows for row in pair if row["engine"] == "fsdp2"):
        (gathers, reductions), (end_gathers, end_reductions) = BLOCK[row["method"]], ENDS[row["method"]]
        passes = row["micros"]
        if row["settings"] == ONCE:
            passes = gathers = 1
        wanted = {
            "all_gather": passes * (row["layers"] * gathers + end_gathers),
            "reduce_scatter": passes * (row["layers"] * reductions + end_reductions),
        }
        if row["settings"] == HALVES:  # the last norm's sum is a control message by its size
            wanted["all_reduce"] = row["layers"] + 2
        # torch 2.11 gathers once more in a pass, something of less than a thousandth of the bytes (the test above)
        extra = row["kinds"]["all_gather"] - wanted["all_gather"]
        assert 0 <= extra <= passes, (row["method"], row["settings"], row["kinds"])
        assert row["kinds"] | {"all_gather": wanted["all_gather"]} == wanted, (row["method"], row["settings"])


def test_what_is_cut_by_buckets_stays_within_its_budget(rows: list[tuple[Row, Row]]) -> None:
    """ZeRO's buckets are smaller than a block here, as they are for 8B: a prefetch takes a part of one."""
    most = {"full": 4, "lora": 12, "qlora": 18}  # a block that is trained whole is gathered whole: two parts, twice
    for short, deep in rows:
        for row in (short, deep):
            kinds, engine = row["kinds"], row["engine"]
            if engine == "ddp":
                assert kinds == {"all_reduce": 1}, "this model fits one bucket; no micro-batch adds one"
            if engine in ("zero1", "zero2"):
                assert kinds.keys() == {"reduce", "all_gather"}
                assert kinds["all_gather"] == 1
            if engine == "zero3":
                passes = row["micros"]
                assert kinds.keys() == {"all_gather", "reduce_scatter"}
                assert kinds["all_gather"] <= passes * (row["layers"] * most[row["method"]] + 4)
                assert kinds["reduce_scatter"] <= passes * (row["layers"] + 4)
    once, twice = (
        next(deep for _, deep in rows if (deep["engine"], deep["method"], deep["micros"]) == ("zero1", "full", micros))
        for micros in (1, 2)
    )
    assert once["kinds"] == twice["kinds"], "zero1 reduces once a step"
