"""Updates in the backward pass: the same bits as after it, without gradients; continued; and what stops them."""

import hashlib

import pytest
from harness import Bench, Run

pytestmark = pytest.mark.slow
FREE = 'train.max_grad_norm="off"'
IN_BACKWARD = "train.optimizer_in_backward=true"
CASES = {
    "full": [],
    "bf16": ['model.dtype="bfloat16"'],
    "lora": ['method={name="lora", r=4, lora_plus_ratio=4.0}', 'train.activation_checkpointing="full"'],
    "low-bit": ['optim.name="adamw_4bit"'],
    "tokens": ['method={name="lora", r=4}', 'model.add_tokens=["<tool>"]'],
}
ALONE = {"muon": ['optim={name="muon", learning_rate=3e-3}'], "8-bit": ['optim.name="adamw_8bit"']}


def cases(engine: str, world: int) -> dict[str, list[str]]:
    fixed = [FREE, f'engine.name="{engine}"', f"train.micro_batch_size={8 // world}", "checkpoint.every_steps=3"]
    chosen = CASES | (ALONE if engine == "solo" else {})
    return {f"{name}{way}": [*fixed, *more, *extra]
            for name, more in chosen.items() for way, extra in (("", []), ("-in", [IN_BACKWARD]))}  # fmt: skip


def weights(run: Run) -> str:
    assert run.folder is not None
    files = sorted((run.folder / "final").glob("*model.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize(("engine", "world"), [("solo", 1), ("fsdp2", 2)])
def test_the_same_bits_and_a_cut_changes_nothing(bench: Bench, engine: str, world: int) -> None:
    chosen = cases(engine, world)
    runs = bench.launch(world, chosen, tag=f"bw-{engine}")
    for name in chosen:
        assert not runs[name].error, (name, runs[name].error)
    for name in (name for name in chosen if f"{name}-in" in chosen):
        plain, inside = runs[name], runs[f"{name}-in"]
        assert inside.column("loss") == plain.column("loss"), name
        assert inside.column("grad_norm") == plain.column("grad_norm"), name
        assert weights(inside) == weights(plain), name
        assert plain.column("loss")[-1] < plain.column("loss")[0], name
    inside = [name for name in chosen if name.endswith("-in")]
    saved = {name: {"resume": str(runs[name].folder / "checkpoints/step-00000003")} for name in inside}
    again = bench.launch(world, {name: chosen[name] for name in inside}, tag=f"bw-again-{engine}", extra=saved)
    for name in inside:
        assert not again[name].error, (name, again[name].error)
        assert len(again[name].steps) == 3
        assert weights(again[name]) == weights(runs[name]), name


def test_what_is_not_finite_stops_before_or_says_that_it_was_too_late(bench: Bench) -> None:
    poisoned = ["data.packing=false", "data.shuffle=false", FREE, IN_BACKWARD, *bench.poisoned(row=8 + 6)]
    runs = bench.launch(1, {"loss": [*poisoned, "train.micro_batch_size=8"]}, tag="bw-poisoned")
    assert "NumericError: step 2: loss nan is not finite, no weight was changed" in runs["loss"].error


def test_engines_that_cannot_refuse(bench: Bench) -> None:
    runs = bench.launch(2, {"auto": [FREE, IN_BACKWARD, "train.micro_batch_size=4", 'engine.name="auto"',
                                     'method={name="lora", r=4}']}, tag="bw-auto")  # fmt: skip
    assert "engine ddp adds gradients up over ranks in its own buffers" in runs["auto"].error
    several = bench.launch(1, {"sums": [FREE, IN_BACKWARD, "train.micro_batch_size=4"]}, tag="bw-sums")
    assert "takes one micro-batch a step, and there are 2" in several["sums"].error
