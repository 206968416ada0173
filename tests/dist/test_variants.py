"""What trades memory or speed changes neither the loss nor the norm; and what must stop a run stops all of it."""

import contextlib
import json
import socket
import sys
from pathlib import Path

import pytest
from harness import BATCH, ROOT, WHOLE_GRIDS, Bench, Run, relative, run

TOLERANCE = 1e-5
SOLO = {
    "plain": [],
    "sdpa": ['model.attention="sdpa"'],
    "eager": ['model.attention="eager"'],
    "full-logits": ['model.cross_entropy="full"'],
    "checkpoint-full": ['train.activation_checkpointing="full"'],
    "checkpoint-selective": ['train.activation_checkpointing="selective"'],
    "rehearse": ["train.rehearse=true"],
    "workers": ["data.num_workers=2", 'data.cache_dir="{folder}/cache2"'],
    "lora": ['method.name="lora"', "method.r=4", "optim.learning_rate=3e-3"],
    "lora-checkpoint": ['method.name="lora"', "method.r=4", "optim.learning_rate=3e-3",
                        'train.activation_checkpointing="full"'],
    "adamw_8bit": ['optim.name="adamw_8bit"'],
    "bf16": ['model.dtype="bfloat16"'],
}  # fmt: skip
"""Overrides of one process; `plain` is what the others are compared with."""

SHARDED = {
    "checkpoint-full": ['train.activation_checkpointing="full"', 'engine.name="{engine}"'],
    "checkpoint-selective": ['train.activation_checkpointing="selective"', 'engine.name="{engine}"'],
    "rehearse": ["train.rehearse=true", 'engine.name="{engine}"'],
    "offload": ['engine.name="{engine}"', 'engine.offload="all"'],
    "bf16": ['model.dtype="bfloat16"', 'engine.name="{engine}"'],
    "dora": [
        'method.name="lora"',
        "method.r=4",
        "method.dora=true",
        "optim.learning_rate=3e-3",
        'engine.name="{engine}"',
    ],
    "poisoned": ["data.packing=false", "data.shuffle=false", 'engine.name="{engine}"'],
}


if WHOLE_GRIDS:  # tests/unit/model proves a compiled block
    SOLO["compile"] = ["train.compile=true"]


def filled(cases: dict[str, list[str]], **values: str) -> dict[str, list[str]]:
    out = {}
    for name, overrides in cases.items():
        out[name] = list(overrides)
        for key, value in values.items():
            out[name] = [text.replace(f"{{{key}}}", value) for text in out[name]]
    return out


@pytest.fixture(scope="session")
def solo(bench: Bench) -> dict[str, Run]:
    return bench.launch(1, filled(SOLO | {"dora": SHARDED["dora"]}, folder=str(bench.folder), engine="solo"), tag="v1")


@pytest.fixture(scope="session", params=["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def sharded(request: pytest.FixtureRequest, bench: Bench) -> dict[str, Run]:
    cases = filled(SHARDED, engine=request.param)
    cases["poisoned"] += bench.poisoned(row=BATCH + 6)  # second step, second rank
    return bench.launch(2, cases, tag=f"v-{request.param}")


def same(run: Run, reference: Run) -> float:
    return max(relative(run.column(name), reference.column(name)) for name in ("loss", "grad_norm"))


def test_memory_and_speed_savers_keep_the_loss(solo: dict[str, Run]) -> None:
    exact = [
        "sdpa",
        "eager",
        "full-logits",
        "checkpoint-full",
        "checkpoint-selective",
        "workers",
        "rehearse",
        *(["compile"] if WHOLE_GRIDS else []),
    ]
    worst = {name: same(solo[name], solo["plain"]) for name in exact}
    worst["lora-checkpoint"] = same(solo["lora-checkpoint"], solo["lora"])
    assert max(worst.values()) < TOLERANCE, worst


def test_rounding_choices_stay_close(solo: dict[str, Run]) -> None:
    """8-bit moments and bf16 are approximations: near, and not equal (else they would not be what they say)."""
    for name, bound in (("adamw_8bit", 0.02), ("bf16", 0.02)):
        gap = relative(solo[name].column("loss"), solo["plain"].column("loss"))
        assert 1e-7 < gap < bound, (name, gap)


def test_savers_keep_the_loss_when_sharded(sharded: dict[str, Run], solo: dict[str, Run]) -> None:
    exact = ("checkpoint-full", "checkpoint-selective", "offload", "rehearse")
    worst = {name: same(sharded[name], solo["plain"]) for name in exact}
    worst["dora"] = same(sharded["dora"], solo["dora"])
    assert max(worst.values()) < TOLERANCE, worst
    assert relative(sharded["bf16"].column("loss"), solo["bf16"].column("loss")) < 0.01


@pytest.mark.row(22)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    sharded: dict[str, Run], bench: Bench
) -> None:
    said = sharded["poisoned"].error
    assert "NumericError: step 2: loss nan is not finite, no weight was changed" in said
    assert "(rank 1: " in said
    assert f"poisoned.jsonl row {BATCH + 6}" in said
    folder = next(bench.folder.glob("runs/v-*poisoned"))
    ended = json.loads((folder / "exit.json").read_text())
    assert ended["code"] == 5
    assert not (folder / "final").exists()
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in steps if "loss" in record][1:] == [(2, "nan")], "logged too"


@pytest.mark.parametrize(
    "config", ["cpu-zero3", *(pytest.param(f"cpu-{engine}", marks=pytest.mark.slow) for engine in ("fsdp2", "ddp"))]
)
def test_accelerate_launch_runs_the_job(bench: Bench, config: str) -> None:
    engine = config.removeprefix("cpu-")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*launch, "--config_file", f"launch/{config}.yaml", "-m", "distft.train", str(bench.recipe)]
    for setting in (f'name="launch-{config}"', f'engine.name="{engine}"', "train.max_steps=3", "log.console='plain'"):
        command += ["--set", setting]
    done = run(command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"engine {engine}" in done.stderr
    folder = bench.folder / "runs" / f"launch-{config}"
    facts = json.loads((folder / "manifest.json").read_text())
    assert (facts["world"], facts["engine"]) == (2, engine)
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    assert (folder / "final/model.safetensors").is_file()


def test_a_launcher_configured_for_another_engine_is_refused(bench: Bench) -> None:
    """accelerate's DeepSpeed launch under a recipe that says ddp: two wills, so none is guessed."""
    done = run(
        [sys.executable, "-m", "distft.train", str(bench.recipe), "--set", 'engine.name="fsdp2"'],
        ACCELERATE_USE_DEEPSPEED="true",
    )
    assert done.returncode == 9
    assert "accelerate launch was configured with --use_deepspeed, but the recipe says" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    """As it stands, on the shipped recipe; only its folder is another."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert "from distft import" in example
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = run([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{example}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["runs/tiny-full/final", "3"]
    assert (tmp_path / "runs/tiny-full/final/model.safetensors").is_file()


@pytest.mark.row(40)
def test_distft_train_starts_its_processes_and_refuses_before_it_does(bench: Bench) -> None:
    """Also while the port that launchers use by default is taken."""
    cli = [sys.executable, "-m", "distft.cli", "train", str(bench.recipe), "--nproc", "2", "--set", 'name="cli"']
    wrong = run([*cli, "--set", "optim.learning_rat=1"])
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # somebody else has it already
            held.enter_context(socket.create_server(("localhost", 29500)))
        done = run([*cli, "--set", "engine.name='fsdp2'", "--set", "train.max_steps=3"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((bench.folder / "runs/cli/manifest.json").read_text())["world"] == 2


@pytest.mark.row(32)
def test_a_fault_is_not_a_traceback(bench: Bench) -> None:
    broken = bench.folder / "broken.toml"
    broken.write_text(bench.recipe.read_text().replace("learning_rate", "learning_rat"))
    done = run([sys.executable, "-m", "distft.train", str(broken)])
    assert done.returncode == 2
    assert 'did you mean "learning_rate"' in done.stderr
    assert "Traceback" not in done.stderr
    nowhere = ["--set", 'name="faulty"', "--set", 'data.train.0.path="nowhere.jsonl"']
    done = run([sys.executable, "-m", "distft.train", str(bench.recipe), *nowhere])
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    ended = json.loads((bench.folder / "runs/faulty/exit.json").read_text())
    assert ended["code"] == 3
    assert ended["reason"].startswith("data: ")
