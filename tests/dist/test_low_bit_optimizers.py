"""Moments of few bits under every kind of engine: near AdamW, cut and continued bit for bit, read by another engine."""

import hashlib

import pytest
from harness import STEPS, Bench, Run, relative

pytestmark = pytest.mark.slow
CUT = 3
NAMES = ("adamw_4bit", "adamw_fp8")
BOUND = {"adamw_4bit": 0.05, "adamw_fp8": 0.05}
"""Relative distance of losses from fp32 moments', and of one engine's from another's: blocks are cut otherwise."""


def cases(engine: str, *, reference: bool) -> dict[str, list[str]]:
    fixed = [f'engine.name="{engine}"', "train.micro_batch_size=1", 'checkpoint.every_steps="off"']
    out = {"adamw": [*fixed, 'optim.name="adamw"']} if reference else {}
    for name in NAMES:
        out[name] = out[f"cut-{name}"] = [*fixed, f'optim.name="{name}"']
    return out


@pytest.fixture(scope="module")
def solo(bench: Bench) -> dict[str, Run]:
    return launched(bench, "solo", 1)


def launched(bench: Bench, engine: str, world: int) -> dict[str, Run]:
    """Every case; those that were cut went on."""
    chosen = cases(engine, reference=engine == "solo")
    extra = {
        name: {"fault": f"term:rank={world - 1},point=step,step={CUT};raise:point={name}"}
        for name in chosen
        if name.startswith("cut-")
    }
    runs = bench.launch(world, chosen, tag=f"low-{engine}", extra=extra)
    for name in extra:
        assert f"after step {CUT}; the state is saved" in runs[name].error, runs[name].error
    return runs | bench.launch(world, {name: chosen[name] for name in extra}, tag=f"low-{engine}")


def weights(run: Run) -> str:
    assert run.folder is not None
    return hashlib.sha256((run.folder / "final/model.safetensors").read_bytes()).hexdigest()


def check(runs: dict[str, Run]) -> None:
    for name in NAMES:
        whole, cut = runs[name], runs[f"cut-{name}"]
        assert cut.column("loss") == whole.column("loss"), name
        assert weights(cut) == weights(whole), name


def test_alone(solo: dict[str, Run]) -> None:
    check(solo)
    for name in NAMES:
        gap = relative(solo[name].column("loss"), solo["adamw"].column("loss"))
        assert 1e-7 < gap < BOUND[name], (name, gap)
        assert solo[name].column("loss")[-1] < solo[name].column("loss")[0] - 0.1, "it learns"


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_are_one_and_a_cut_changes_nothing(bench: Bench, solo: dict[str, Run], engine: str) -> None:
    runs = launched(bench, engine, 2)
    check(runs)
    crossed = cases(engine, reference=False)
    crossed = {f"crossed-{name}": crossed[name] for name in NAMES}
    saved = {
        f"crossed-{name}": {"resume": str(bench.folder / f"runs/low-solo-cut-{name}/checkpoints/step-{CUT:08d}")}
        for name in NAMES
    }
    others = bench.launch(2, crossed, tag=f"low-crossed-{engine}", extra=saved)
    for name in NAMES:
        bound = 1e-5 if engine == "ddp" else BOUND[name]
        assert relative(runs[name].column("loss"), solo[name].column("loss")) < bound, (name, engine)
        went_on = others[f"crossed-{name}"]
        assert not went_on.error, went_on.error
        assert len(went_on.steps) == STEPS - CUT
        assert went_on.column("loss") == pytest.approx(solo[name].column("loss")[CUT:], rel=bound)
