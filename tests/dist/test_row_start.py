"""An adapter that starts from rows, in whole runs: beside 4 bits, new tokens and DoRA; and what is refused."""

import pytest
import torch
from harness import Bench, Run, relative
from safetensors.torch import load_file

EVA = 'method={{name="{}", r=4, init="eva"{}}}'
CASES = {
    "qlora": [EVA.format("qlora", "")],
    "dora": [EVA.format("lora", ', dora=true, eva={tau=0.9, tokens="all"}')],
    "tokens": [EVA.format("lora", ", eva={tau=0.9}"), 'model.add_tokens=["<tool>"]'],
    "alone": [EVA.format("lora", ", eva={tau=0.9}"), "data.packing=false"],
    "plain": ['method={name="lora", r=4}'],
    "few": ['method={name="lora", r=60, init="eva", target_modules=["down_proj"]}'],
}


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, Run]:
    slowly = ["optim.learning_rate=1e-3", "checkpoint.every_steps=3"]
    return bench.launch(1, {name: [*case, *slowly] for name, case in CASES.items()}, tag="rows")


@pytest.mark.slow
def test_every_form_of_lora_starts_from_rows(runs: dict[str, Run], bench: Bench) -> None:
    for name in ("qlora", "dora", "tokens", "alone"):
        run = runs[name]
        assert not run.error, run.error
        assert run.steps[-1]["loss"] < run.steps[0]["loss"]
        start = load_file(run.folder / "adapter_start.safetensors")
        assert len(start) == 14
        for layer, rows_RI in start.items():
            assert len(rows_RI) == 4, layer
            assert torch.allclose(rows_RI @ rows_RI.T, torch.eye(4), atol=1e-4), layer
    assert abs(runs["alone"].evals[0]["eval_loss"] - runs["plain"].evals[0]["eval_loss"]) < 1e-5, (
        "it starts as the base"
    )
    assert relative(runs["alone"].column("loss"), runs["plain"].column("loss")) > 1e-3, "and learns otherwise"


@pytest.mark.slow
def test_what_is_missing_is_said(runs: dict[str, Run], bench: Bench) -> None:
    assert "no sequence of the training rows has 120 trained tokens" in runs["few"].error
    assert "a smaller r, or eva" in runs["few"].error
    kept = runs["alone"].folder / "adapter_start.safetensors"
    kept.unlink()
    resume = {"resume": str(runs["alone"].folder / "checkpoints/step-00000003")}
    again = bench.launch(1, {"alone": CASES["alone"]}, tag="gone", extra={"alone": resume})["alone"]
    assert "adapter_start.safetensors is gone" in again.error
