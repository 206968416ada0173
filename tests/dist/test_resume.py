"""A checkpoint of any engine and world size continues under any other; under its own, bit for bit."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from harness import STEPS, Bench, Run

CUT = 3
METHODS = {
    "full": [],
    "full-8bit": ['optim.name="paged_adamw_8bit"'],
    "lora": ['method.name="lora"', "method.r=4", "method.dropout=0.1", "optim.learning_rate=3e-3"],
    "qlora": ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3", 'optim.name="paged_adamw_32bit"'],
}
LAYOUTS = [("solo", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)]
QUICK = [("zero3", 2), ("fsdp2", 2)]
FULL_GRID = os.environ.get("DISTFT_RESUME_GRID") == "1"
BOUNDS = {"full": 1e-5, "full-8bit": 2e-2, "lora": 1e-5, "qlora": 1e-5}
"""Relative difference of losses after the cut, on another layout. 8-bit blocks are cut elsewhere, and rounded anew."""


def label(layout: tuple[str, int]) -> str:
    return f"{layout[0]}x{layout[1]}"


def overrides(layout: tuple[str, int], method: str) -> list[str]:
    return [f'engine.name="{layout[0]}"', "train.micro_batch_size=2", 'checkpoint.every_steps="off"', *METHODS[method]]


class Grid:
    """Runs each layout once uninterrupted and once stopped after CUT steps, in one launch."""

    def __init__(self, bench: Bench, layouts: list[tuple[str, int]]) -> None:
        self.bench, self.layouts = bench, layouts
        self.whole: dict[str, dict[str, Run]] = {}
        for layout in layouts:
            cases, extra = {}, {}
            for method in METHODS:
                cases[f"whole-{method}"] = cases[f"cut-{method}"] = overrides(layout, method)
                extra[f"cut-{method}"] = {
                    "fault": f"term:rank={layout[1] - 1},point=step,step={CUT};raise:point={method}"
                }
            runs = bench.launch(layout[1], cases, tag=f"g-{label(layout)}", extra=extra)
            for method in METHODS:
                said = runs[f"cut-{method}"].error
                assert f"Preempted: stopped by SIGTERM after step {CUT}; the state is saved" in said, (method, said)
            self.whole[label(layout)] = {method: runs[f"whole-{method}"] for method in METHODS}

    def checkpoint(self, layout: tuple[str, int], method: str) -> Path:
        return self.bench.folder / f"runs/g-{label(layout)}-cut-{method}/checkpoints/step-{CUT:08d}"

    def resumed(self, layout: tuple[str, int]) -> dict[tuple[str, str], Run]:
        """Under `layout`, from every layout's checkpoint: (saved under, method) -> run."""
        cases, extra = {}, {}
        for saved in self.layouts:
            for method in METHODS:
                name = f"from-{label(saved)}-{method}"
                cases[name] = overrides(layout, method)
                extra[name] = {"resume": str(self.checkpoint(saved, method))}
        runs = self.bench.launch(layout[1], cases, tag=f"r-{label(layout)}", extra=extra)
        return {(label(s), m): runs[f"from-{label(s)}-{m}"] for s in self.layouts for m in METHODS}


@pytest.fixture(scope="module")
def grid(bench: Bench) -> Grid:
    return Grid(bench, LAYOUTS if FULL_GRID else QUICK)


def tensors(run: Run) -> str:
    assert run.folder is not None
    digest = hashlib.sha256()
    for file in sorted((run.folder / "final").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def gap(run: Run, reference: Run) -> float:
    assert not run.error, run.error
    ours = {r["step"]: r["loss"] for r in run.steps}
    assert sorted(ours) == list(range(CUT + 1, STEPS + 1)), "goes on where the checkpoint was, no step twice"
    return max(abs(ours[r["step"]] - r["loss"]) / abs(r["loss"]) for r in reference.steps if r["step"] in ours)


@pytest.mark.parametrize("layout", LAYOUTS if FULL_GRID else [*QUICK, ("solo", 1)], ids=label)
def test_continues_from_every_layout(grid: Grid, layout: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    worst = {}
    for (saved, method), run in grid.resumed(layout).items():
        whole = grid.whole[saved][method]
        worst[f"{saved} -> {label(layout)} {method}"] = (gap(run, whole), BOUNDS[method])
        if saved == label(layout):
            exact = [(r["loss"], r["grad_norm"], r["lr"]) for r in run.steps]
            assert exact == [(r["loss"], r["grad_norm"], r["lr"]) for r in whole.steps[CUT:]], (saved, method)
            assert tensors(run) == tensors(whole), (saved, method)
            assert run.evals[-1]["eval_loss"] == whole.evals[-1]["eval_loss"]
    with capsys.disabled():
        for name, (value, _) in worst.items():
            print(f"resume {name}: {value:.1e}")
    assert all(value < bound for value, bound in worst.values()), worst


def test_the_same_command_continues_and_then_says_complete(grid: Grid) -> None:
    """`--resume auto`: the stopped run, started again by its own command line, ends as the uninterrupted one did."""
    layout = grid.layouts[0]
    again = {f"cut-{method}": overrides(layout, method) for method in METHODS}
    runs = grid.bench.launch(layout[1], again, tag=f"g-{label(layout)}")
    for method in METHODS:
        run, whole = runs[f"cut-{method}"], grid.whole[label(layout)][method]
        assert run.column("loss") == whole.column("loss"), "steps before the stop are still there, none twice"
        assert tensors(run) == tensors(whole)
        assert run.folder is not None
        assert json.loads((run.folder / "exit.json").read_text())["step"] == STEPS
    before = {p: p.stat().st_mtime_ns for p in (grid.bench.folder / "runs").glob("g-*/final/*")}
    runs = grid.bench.launch(layout[1], again, tag=f"g-{label(layout)}")
    assert all(len(run.steps) == STEPS for run in runs.values())
    assert {p: p.stat().st_mtime_ns for p in before} == before, "nothing was done again"


def test_a_changed_run_is_refused_or_asked_about(grid: Grid, bench: Bench) -> None:
    layout = ("solo", 1)
    source = str(grid.checkpoint(grid.layouts[0], "full"))
    changed = {
        "lr": ["optim.learning_rate=5e-3"],
        "seed": ["seed=43"],
        "batch": ["train.global_batch_size=4"],
        "rows": [f'data.train.0.path="{bench.folder}/valid.jsonl"', "data.eval=[]", "train.max_steps=3"],
        "harmless": ["log.every_steps=2", 'model.attention="eager"'],
        "method": ['method.name="lora"'],
    }
    cases = {name: [*overrides(layout, "full"), *more] for name, more in changed.items()}
    runs = bench.launch(1, cases, tag="changed", extra={name: {"resume": source} for name in cases})
    assert "the recipe has changed\n  optim.learning_rate: 0.01 -> 0.005" in runs["lr"].error
    assert "--allow-changes" in runs["lr"].error
    for name, said in (
        ("seed", "seed: 42 -> 43"),
        ("batch", "train.global_batch_size: 8 -> 4"),
        ("method", "method.name"),
    ):
        assert "in a way that this checkpoint cannot continue" in runs[name].error
        assert said in runs[name].error
    assert "DataError" in runs["rows"].error
    assert "was trained on other rows" in runs["rows"].error
    assert not runs["harmless"].error
