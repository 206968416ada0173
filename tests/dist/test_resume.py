"""A checkpoint of any engine and world size continues under any other; under its own, bit for bit."""

import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from harness import SETTINGS, STEPS, WHOLE_GRIDS, Bench, Layout, Run, label

CUT = 3
METHODS = {
    "full": [],
    "full-8bit": ['optim.name="paged_adamw_8bit"'],
    "lora": ['method.name="lora"', "method.r=4", "method.dropout=0.1", "optim.learning_rate=3e-3"],
    "qlora": ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3", 'optim.name="paged_adamw_32bit"'],
}
SPREAD = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
GRID_FILE = os.environ.get("DISTFT_RESUME_GRID", "")
"""Where the table of the whole grid goes: every engine on 1 to 4 processes; empty: the quick part only."""
LAYOUTS = [("solo", 1), *((engine, world) for world in (1, 2, 3, 4) for engine in SPREAD)]
QUICK = [("zero3", 2), ("fsdp2", 2)]
QUICK_METHODS = {"zero3": ("full",), "fsdp2": ("full", "full-8bit", "lora"), "solo": ("full", "full-8bit", "lora")}
"""What make test runs; the state of qlora's adapters is that of lora's."""
SAVED, TARGETS = (LAYOUTS, LAYOUTS) if GRID_FILE else (QUICK, [*QUICK, ("solo", 1)])
PER_LAUNCH = 48
"""Cases of one launch: libraries keep something of every run, so memory grows with their number."""
FOUR: list[Layout] = [("zero3", 2), ("fsdp2", 4), ("fsdp2", 4, "halves"), ("zero3", 4, "halves")]
BOUNDS = {"full": 1e-5, "full-8bit": 2e-2, "lora": 1e-5, "qlora": 1e-5}
"""Relative difference of losses after the cut, on another layout. 8-bit blocks are cut elsewhere, and rounded anew."""


def methods_of(layout: Layout) -> Sequence[str]:
    """Those that are saved and continued under it."""
    return list(METHODS) if GRID_FILE or WHOLE_GRIDS else QUICK_METHODS.get(layout[0], ("full", "lora"))


def overrides(layout: Layout, method: str) -> list[str]:
    # A micro-batch divides every rank's share, and is the same everywhere: dropout is drawn for a micro-batch at once.
    split = ["train.global_batch_size=12", "train.micro_batch_size=1"]
    engine = [f'engine.name="{layout[0]}"', *(SETTINGS[name] for name in layout[2:])]
    return [*engine, *split, 'checkpoint.every_steps="off"', *METHODS[method]]


def launched(
    bench: Bench, world: int, cases: dict[str, list[str]], *, tag: str, extra: dict[str, dict[str, str]]
) -> dict[str, Run]:
    names, found = list(cases), {}
    for part in range(0, len(names), PER_LAUNCH):
        some = {name: cases[name] for name in names[part : part + PER_LAUNCH]}
        found |= bench.launch(world, some, tag=tag, extra=extra, timeout_s=1800)
    return found


class Grid:
    """Runs each layout once uninterrupted and once stopped after CUT steps, in one launch."""

    def __init__(self, bench: Bench, layouts: Sequence[Layout], name: str = "g") -> None:
        self.bench, self.layouts, self.name = bench, layouts, name
        self.whole: dict[str, dict[str, Run]] = {}
        for layout in layouts:
            cases, extra = {}, {}
            for method in methods_of(layout):
                cases[f"whole-{method}"] = cases[f"cut-{method}"] = overrides(layout, method)
                extra[f"cut-{method}"] = {
                    "fault": f"term:rank={layout[1] - 1},point=step,step={CUT};raise:point={method}"
                }
            runs = launched(bench, layout[1], cases, tag=f"{name}-{label(layout)}", extra=extra)
            for method in methods_of(layout):
                said = runs[f"cut-{method}"].error
                assert f"Preempted: stopped by SIGTERM after step {CUT}; the state is saved" in said, (method, said)
            self.whole[label(layout)] = {method: runs[f"whole-{method}"] for method in methods_of(layout)}

    def checkpoint(self, layout: Layout, method: str) -> Path:
        return self.bench.folder / f"runs/{self.name}-{label(layout)}-cut-{method}/checkpoints/step-{CUT:08d}"

    def resumed(self, layout: Layout) -> dict[tuple[str, str], Run]:
        """Under `layout`, from every layout's checkpoint: (saved under, method) -> run."""
        cases, extra = {}, {}
        pairs = [(s, m) for s in self.layouts for m in methods_of(s) if m in methods_of(layout)]
        for saved, method in pairs:
            name = f"from-{label(saved)}-{method}"
            cases[name] = overrides(layout, method)
            extra[name] = {"resume": str(self.checkpoint(saved, method))}
        runs = launched(self.bench, layout[1], cases, tag=f"{self.name}r-{label(layout)}", extra=extra)
        return {(label(saved), method): runs[f"from-{label(saved)}-{method}"] for saved, method in pairs}


@pytest.fixture(scope="module")
def grid(bench: Bench) -> Grid:
    return Grid(bench, SAVED)


@pytest.fixture(scope="module")
def cells() -> Iterator[dict[tuple[str, str, str], float]]:
    """(saved under, continued under, method) -> largest relative difference of losses after the cut."""
    found: dict[tuple[str, str, str], float] = {}
    yield found
    if GRID_FILE:
        Path(GRID_FILE).write_text("\n".join(page(found)) + "\n", encoding="utf-8")


def page(cells: dict[tuple[str, str, str], float]) -> Iterator[str]:
    """The table, with one part per method."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    yield "# Resume grid: every layout's checkpoint under every layout"
    yield f"\n{datetime.date.today()}, commit {commit.stdout.strip()}, torch {torch.__version__}, CPU, gloo."
    yield f"Rows: saved under, after step {CUT} of {STEPS}; columns: continued under. Largest relative difference of"
    yield "a loss after the cut from the uninterrupted run of the saving layout; bold: the same layout, equal bit for"
    yield "bit."
    names = [label(layout) for layout in LAYOUTS]
    for method in METHODS:
        rows = [[cells.get((saved, target, method)) for target in names] for saved in names]
        worst = max(value for row in rows for value in row if value is not None)
        yield f"\n## {method}: worst {worst:.1e}, bound {BOUNDS[method]:.0e}\n"
        yield f"| |{'|'.join(names)}|\n|---|{'---|' * len(names)}"
        for saved, row in zip(names, rows, strict=True):
            shown = ["–" if value is None else "0" if value == 0 else f"{value:.0e}" for value in row]
            here = names.index(saved)
            shown[here] = f"**{shown[here]}**"
            yield f"|{saved}|{'|'.join(shown)}|"


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


@pytest.fixture(scope="module")
def grid_of_four(bench: Bench) -> Grid:
    return Grid(bench, FOUR, name="four")


@pytest.mark.row(16)
@pytest.mark.parametrize("layout", TARGETS, ids=label)
def test_continues_from_every_layout(
    grid: Grid, cells: dict[tuple[str, str, str], float], layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    cells |= continues(grid, layout, capsys)


@pytest.mark.slow
@pytest.mark.row(16)
@pytest.mark.parametrize("layout", [*FOUR, ("solo", 1)], ids=label)
def test_four_ranks_become_two_or_one_and_two_become_four(
    grid_of_four: Grid, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    continues(grid_of_four, layout, capsys)


def continues(grid: Grid, layout: Layout, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], float]:
    """(saved under, continued under, method) -> largest relative difference of a loss."""
    cells = {}
    worst = {}
    for (saved, method), run in grid.resumed(layout).items():
        whole = grid.whole[saved][method]
        worst[f"{saved} -> {label(layout)} {method}"] = (gap(run, whole), BOUNDS[method])
        cells[saved, label(layout), method] = gap(run, whole)
        assert [r["tokens"] for r in run.steps] == whole.column("tokens")[CUT:], "the same samples in every step"
        if saved == label(layout):
            exact = [(r["loss"], r["grad_norm"], r["lr"]) for r in run.steps]
            assert exact == [(r["loss"], r["grad_norm"], r["lr"]) for r in whole.steps[CUT:]], (saved, method)
            assert tensors(run) == tensors(whole), (saved, method)
            assert run.evals[-1]["eval_loss"] == whole.evals[-1]["eval_loss"]
    with capsys.disabled():
        for name, (value, _) in worst.items():
            print(f"resume {name}: {value:.1e}")
    assert all(value < bound for value, bound in worst.values()), worst
    return cells


@pytest.mark.row(20)
def test_the_same_command_continues_and_then_says_complete(grid: Grid) -> None:
    """`--resume auto`: the stopped run, started again by its own command line, ends as the uninterrupted one did."""
    layout = grid.layouts[0]
    again = {f"cut-{method}": overrides(layout, method) for method in methods_of(layout)}
    runs = grid.bench.launch(layout[1], again, tag=f"g-{label(layout)}")
    for method in methods_of(layout):
        run, whole = runs[f"cut-{method}"], grid.whole[label(layout)][method]
        assert run.column("loss") == whole.column("loss"), "steps before the stop are still there, none twice"
        assert tensors(run) == tensors(whole)
        assert run.folder is not None
        assert json.loads((run.folder / "exit.json").read_text())["step"] == STEPS
    before = {p: p.stat().st_mtime_ns for p in (grid.bench.folder / "runs").glob("g-*/final/*")}
    runs = grid.bench.launch(layout[1], again, tag=f"g-{label(layout)}")
    assert all(len(run.steps) == STEPS for run in runs.values())
    assert {p: p.stat().st_mtime_ns for p in before} == before, "nothing was done again"


@pytest.mark.row(18, 19)
def test_a_changed_run_is_refused_or_asked_about(grid: Grid, bench: Bench) -> None:
    layout = ("solo", 1)
    source = str(grid.checkpoint(grid.layouts[0], "full"))
    changed = {
        "lr": ["optim.learning_rate=5e-3"],
        "seed": ["seed=43"],
        "batch": ["train.global_batch_size=6"],
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
        ("batch", "train.global_batch_size: 12 -> 6"),
        ("method", "method.name"),
    ):
        assert "in a way that this checkpoint cannot continue" in runs[name].error
        assert said in runs[name].error
    assert "DataError" in runs["rows"].error
    assert "was trained on other rows" in runs["rows"].error
    assert not runs["harmless"].error
