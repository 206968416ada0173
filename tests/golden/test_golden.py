"""Six steps of a tiny model against what they gave when they were last looked at: a change of numbers is no accident.

`make golden` (pytest tests/golden --rewrite) writes the files anew; CHANGELOG.md then says why they changed.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from harness import STEPS, Bench, Run, run

TOLERANCE = 1e-4
"""Relative. Other CPUs (other vector widths, another BLAS) sum in another order, which six steps of AdamW amplify to
about 1e-5; a change of meaning (a shifted label, a mean of means, another order of rows) is beyond 1e-3."""

ADAPTER = ["method.r=4", "optim.learning_rate=3e-3"]
CASES = {
    "full": [],
    "lora": ['method.name="lora"', *ADAPTER],
    "qlora": ['method.name="qlora"', *ADAPTER],
}
COMMON = ['engine.name="solo"', "data.packing=true", "train.micro_batch_size=2", "seed=11"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, Run]:
    return bench.launch(1, {name: [*COMMON, *own] for name, own in CASES.items()}, tag="golden")


@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_are_what_they_were(name: str, runs: dict[str, Run], request: pytest.FixtureRequest) -> None:
    path = Path(__file__).with_name(f"{name}.txt")
    losses, norms = runs[name].column("loss"), runs[name].column("grad_norm")
    if request.config.getoption("--rewrite"):
        rows = [
            f"{step} {loss:.9g} {norm:.9g}\n" for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        ]
        path.write_text("# step loss grad_norm\n" + "".join(rows))
        pytest.skip(f"wrote {path.name}")
    wanted = [tuple(map(float, line.split())) for line in path.read_text().splitlines()[1:]]
    assert [step for step, _, _ in wanted] == list(range(1, STEPS + 1))
    assert losses == pytest.approx([loss for _, loss, _ in wanted], rel=TOLERANCE)
    assert norms == pytest.approx([norm for _, _, norm in wanted], rel=TOLERANCE)


SEVERAL = """
import json, sys
from distft import load_recipe, train
recipe, *engines = sys.argv[1:]
folders = []
for number, engine in enumerate(engines):
    overrides = [f'name="python-{number}"', f'engine.name="{engine}"', "train.micro_batch_size=2", "seed=11"]
    folders.append(str(train(load_recipe(recipe, overrides=overrides)).folder))
print(json.dumps(folders))
"""


def test_runs_one_after_another_in_one_python_process_are_each_as_the_first(bench: Bench) -> None:
    """From Python, without a launcher: no engine leaves a process group, a variable or a seed behind."""
    engines = ["fsdp2", "solo", "fsdp2"] + ["zero3", "zero1", "zero3"] * (
        importlib.util.find_spec("deepspeed") is not None
    )
    done = run([sys.executable, "-c", SEVERAL, str(bench.recipe), *engines])
    assert done.returncode == 0, done.stderr[-4000:]
    wanted = [float(line.split()[1]) for line in Path(__file__).with_name("full.txt").read_text().splitlines()[1:]]
    for engine, folder in zip(engines, json.loads(done.stdout.splitlines()[-1]), strict=True):
        losses = Run.read({"folder": folder}).column("loss")
        assert losses == pytest.approx(wanted, rel=TOLERANCE), engine


def test_the_files_are_of_these_cases() -> None:
    assert {path.stem for path in Path(__file__).parent.glob("*.txt")} == set(CASES)
