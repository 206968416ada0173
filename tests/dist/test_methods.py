"""Every method under several processes: the losses of one, a resume bit for bit, and what PEFT loads of it."""

import json
import sys

import pytest
import torch
from final_cards import LOSSES
from harness import Bench, Run, relative, run

TOLERANCE = 1e-5
METHODS: dict[str, str] = {
    "pissa": '{name="lora", r=4, init="pissa"}',
    "olora": '{name="lora", r=4, init="olora", layers_to_transform=[1], rank_pattern={down_proj=2}}',
    "orthogonal": '{name="lora", r=4, init="orthogonal", lora_plus_ratio=4.0}',
    "eva": '{name="lora", r=4, init="eva", eva={rho=2.0, tau=0.9}}',
    "prompt": '{name="prompt_tuning", num_virtual_tokens=5}',
    "p": '{name="p_tuning", num_virtual_tokens=5, encoder_hidden_size=24}',
    "prefix": '{name="prefix_tuning", num_virtual_tokens=5}',
    "prefix-projected": '{name="prefix_tuning", num_virtual_tokens=5, prefix_projection=true, encoder_hidden_size=24}',
    "bottleneck": '{name="bottleneck", size=8}',
    "bottleneck-beside": '{name="bottleneck", size=8, placement="parallel", scale=4.0}',
    "freeze": '{name="freeze", last_blocks=1}',
    "freeze-named": '{name="freeze", parameters=[".*v_proj.weight"], norms=true}',
    "ia3": '{name="ia3"}',
    "vera": '{name="vera", r=8}',
    "oft": '{name="oft", oft_block_size=8}',
    "loha": '{name="loha", r=4}',
    "deploy": '{name="lora", r=4, deploy="q8_0"}',
    "adalora": '{name="adalora", init_r=4, target_r=2, tinit=1, tfinal=1}',
    "lokr": '{name="lokr", r=4, modules_to_save=["norm"]}',
}
FAST = ["prefix-projected", "bottleneck", "vera"]
"""What is tried in every run of the tests: something in each layer, beside each layer, and shared by all."""
ONLY = {"adalora": ("solo", "ddp"), "deploy": ("solo", "ddp", "fsdp2")}
"""Engines that a method trains on, where these are not all."""
UNROUNDED = {"deploy"}
"""What PEFT loads is not the model that was trained: that is the exported one (tests/unit/model/test_deploy.py)."""
RATES = {
    "pissa": 1e-3,
    "eva": 1e-3,
    "olora": 1e-3,
    "orthogonal": 1e-3,
    "ia3": 0.05,
    "vera": 0.02,
    "prompt": 0.05,
    "prefix": 0.05,
}


def cases(engine: str, names: list[str]) -> dict[str, list[str]]:
    return {
        name: [f"method={METHODS[name]}", f"optim.learning_rate={RATES.get(name, 3e-3)}", f'engine.name="{engine}"',
               'checkpoint.every_steps=3']
        for name in names if engine in ONLY.get(name, (engine,))
    }  # fmt: skip


@pytest.fixture(scope="session")
def solo(bench: Bench) -> dict[str, Run]:
    return bench.launch(1, cases("solo", list(METHODS)), tag="m1")


def apart(run: Run, reference: Run) -> float:
    return max(relative(run.column(name), reference.column(name)) for name in ("loss", "grad_norm"))


def test_two_processes_train_some_as_one(bench: Bench) -> None:
    alone, together = (
        bench.launch(world, cases(engine, FAST), tag=f"some-{world}") for world, engine in ((1, "solo"), (2, "zero3"))
    )
    worst = {name: apart(together[name], alone[name]) for name in FAST}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "ddp"])
def test_two_processes_train_as_one(bench: Bench, solo: dict[str, Run], engine: str) -> None:
    runs = bench.launch(2, cases(engine, list(METHODS)), tag=f"m-{engine}")
    worst = {name: apart(runs[name], solo[name]) for name in cases(engine, list(METHODS))}
    assert max(worst.values()) < TOLERANCE, worst
    for name in worst:
        losses = runs[name].column("loss")
        assert losses[-1] < losses[0], name


LOADED = LOSSES + "    found[name] = loss / count\nprint(json.dumps(found))\n"


def later(run: Run) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in run.steps if record["step"] > 3]


PLUS = {
    "plain": 'method={name="lora", r=4}',
    "one": 'method={name="lora", r=4, lora_plus_ratio=1.0}',
    "plus": 'method={name="lora", r=4, lora_plus_ratio=16.0}',
}
"""LoRA+."""


@pytest.mark.slow
def test_b_learns_faster_by_the_ratio_on_every_engine(bench: Bench) -> None:
    """Adam's first step moves every number by its rate, whatever its gradient, where there is no decay."""
    from safetensors.torch import load_file

    first = ["train.max_steps=1", "schedule.warmup_steps=0", 'schedule.name="constant"', "optim.learning_rate=1e-3",
             "optim.weight_decay=0.0"]  # fmt: skip
    runs = bench.launch(1, {name: [method, *first] for name, method in PLUS.items()}, tag="plus")
    tensors = {name: load_file(run.folder / "final/adapter_model.safetensors") for name, run in runs.items()}
    assert all(torch.equal(tensors["plain"][name], tensors["one"][name]) for name in tensors["plain"])
    for name, ratio in (("plain", 1), ("plus", 16)):
        moved = torch.cat([tensor.flatten() for key, tensor in tensors[name].items() if ".lora_B." in key]).abs()
        assert abs(moved.median().item() / (ratio * 1e-3) - 1) < 1e-3
    slowly = "optim.learning_rate=3e-4"
    whole = bench.launch(1, {"plus": [PLUS["plus"], slowly]}, tag="plus-solo")["plus"]
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        run = bench.launch(2, {"plus": [PLUS["plus"], slowly, f'engine.name="{engine}"']}, tag=f"plus-{engine}")["plus"]
        assert apart(run, whole) < TOLERANCE, engine


@pytest.mark.slow
def test_final_is_what_was_trained_to_whoever_reads_its_card(bench: Bench, solo: dict[str, Run]) -> None:
    """The code of the card in a fresh process, without this package: PEFT, or for bottlenecks what stands there."""
    finals = {name: str(solo[name].folder / "final") for name in METHODS if name not in UNROUNDED}
    done = run([sys.executable, "-c", LOADED, json.dumps(finals), str(bench.folder / "valid.jsonl")], PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    worst = {name: abs(found[name] / solo[name].evals[-1]["eval_loss"] - 1) for name in finals}
    assert max(worst.values()) < TOLERANCE, worst
    before = {name: solo[name].evals[0]["eval_loss"] for name in finals}
    assert all(abs(found[name] - before[name]) > 1e-4 for name in finals), "what was loaded is trained"


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(bench: Bench, solo: dict[str, Run]) -> None:
    extra = {
        name: {"resume": str(run.folder / "checkpoints/step-00000003")} for name, run in solo.items() if run.folder
    }
    again = bench.launch(1, cases("solo", list(METHODS)), tag="m-again", extra=extra)
    for name, resumed in again.items():
        assert not resumed.error, resumed.error
        assert later(resumed) == later(solo[name]), name
        assert len(later(resumed)) == 3
        for file in ("adapter_model.safetensors", "model.safetensors"):
            ours, theirs = (ended.folder / "final" / file for ended in (resumed, solo[name]))
            assert ours.exists() == theirs.exists()
            assert not ours.exists() or ours.read_bytes() == theirs.read_bytes(), name
