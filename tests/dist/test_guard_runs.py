"""Real runs that go wrong: what is left out is left out on every rank, under every engine, and after a resume."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BATCH, Bench, Run

SPIKE = 8
"""The step whose rows are unlike all others."""
WORLDS = {"solo": 1, "zero1": 2, "zero3": 2, "fsdp2": 2}
Runs = Callable[[str], dict[str, Run]]
ENGINES = ["solo", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero3", "fsdp2", "zero1"))]
PLAIN = ["data.packing=false", "data.shuffle=false", "train.max_steps=10", 'schedule.name="constant"']
PLAIN += ["schedule.warmup_steps=", "train.micro_batch_size=2", "checkpoint.every_steps=3", "optim.learning_rate=5e-3"]
GUARDS = {
    "skip": 'guard.loss_spike={action="skip", factor=1.3, window=5}',
    "rollback": 'guard.loss_spike={action="rollback", factor=1.3, window=5}',
    "stop": 'guard.loss_spike={action="stop", factor=1.3, window=5}',
}


def rows(folder: Path) -> tuple[Path, Path]:
    """80 rows in ten steps, the eighth of noise; and the same without what steps 7 and 8 see."""
    rng = random.Random(5)
    words = ("disk", "queue", "login", "payments")

    def some(choose) -> dict[str, str]:
        return {"prompt": "say:", "completion": " " + " ".join(choose() for _ in range(rng.randint(6, 12)))}

    def noise() -> str:
        return "".join(rng.choice("qzxjkvw#@%&~^") for _ in range(6))

    lines = []
    for step in range(1, 11):
        for _ in range(BATCH):
            lines.append(json.dumps(some(noise if step == SPIKE else lambda: rng.choice(words))) + "\n")
    spiky, without = folder / "spiky.jsonl", folder / "without.jsonl"
    spiky.write_text("".join(lines))
    without.write_text("".join(lines[: 6 * BATCH] + lines[8 * BATCH :]))
    return spiky, without


@pytest.fixture(scope="module")
def runs(bench: Bench) -> Runs:
    """Engine -> its runs by name, made when they are first asked for."""
    spiky, without = rows(bench.folder)

    @functools.cache
    def of(engine: str) -> dict[str, Run]:
        world = WORLDS[engine]
        common = [*PLAIN, f'engine.name="{engine}"']
        on = f'data.train.0.path="{spiky}"'
        cases = {
            "off": [*common, on],
            "never-seen": [*common, f'data.train.0.path="{without}"', "train.max_steps=8"],
            "nan": [*common, "train.max_steps=6", 'guard.non_finite="skip"', *bench.poisoned(row=BATCH + 6)],
            "cut": [*common, on, GUARDS["skip"]],
            **{name: [*common, on, guard] for name, guard in GUARDS.items()},
        }
        fault = {"cut": {"fault": "raise:point=step,step=9"}}
        found = bench.launch(world, cases, tag=f"guard-{engine}", extra=fault)
        again = bench.launch(world, {"cut": cases["cut"]}, tag=f"guard-{engine}")
        return found | {"again": again["cut"]}

    return of


def events(run: Run, name: str) -> list[dict]:
    assert run.folder is not None
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def losses(run: Run) -> list[float]:
    return [float(loss) for loss in run.column("loss")]


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)) < 1e-5


@pytest.mark.row(22, 23)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_is_left_out_and_counted(runs: Runs, engine: str) -> None:
    run, reference = runs(engine)["nan"], runs("solo")["nan"]
    seen = losses(run)
    assert str(seen[1]) == "nan", "logged, and not hidden"
    assert all(loss == loss for loss in seen[:1] + seen[2:])
    assert close(seen[:1] + seen[2:], losses(reference)[:1] + losses(reference)[2:])
    [left_out] = events(run, "left_out")
    assert left_out["step"] == 2
    assert f"poisoned.jsonl row {BATCH + 6}" in left_out["samples"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spike_is_left_out_or_gone_back_from_or_stops_the_run(runs: Runs, engine: str) -> None:
    off, skip, back = (runs(engine)[name] for name in ("off", "skip", "rollback"))
    assert losses(off)[SPIKE - 1] > 1.3 * losses(off)[SPIKE - 2], "there is a spike to be seen"
    assert losses(skip)[:SPIKE] == losses(off)[:SPIKE]
    assert losses(skip)[SPIKE] != losses(off)[SPIKE], "its update was left out"
    assert [event["step"] for event in events(skip, "left_out")] == [SPIKE]
    assert "times the median" in events(skip, "left_out")[0]["why"]
    for name in ("skip", "rollback"):
        assert close(losses(runs(engine)[name]), losses(runs("solo")[name])), name

    [rolled] = events(back, "rolled_back")
    assert (rolled["step"], rolled["spike"]) == (6, SPIKE)
    assert [event["step"] for event in events(back, "left_out")] == [SPIKE - 1, SPIKE]
    assert [record["step"] for record in back.steps] == list(range(1, 11)), "no step twice"
    assert losses(back)[8:] == losses(runs(engine)["never-seen"])[6:], "as if those rows had never been there"

    said = runs(engine)["stop"].error
    assert f"NumericError: step {SPIKE}: loss" in said
    assert "times the median" in said
    assert "spiky.jsonl row" in said


@pytest.mark.row(22)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_with_a_step_left_out_resumes_bit_for_bit(runs: Runs, engine: str) -> None:
    """The optimizer's own count of steps is one less than the run's."""
    assert "InjectedFault" in runs(engine)["cut"].error
    again, whole = runs(engine)["again"], runs(engine)["skip"]
    assert losses(again) == losses(whole)
    final = "final/model.safetensors"
    assert (again.folder / final).read_bytes() == (whole.folder / final).read_bytes()
