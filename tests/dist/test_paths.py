"""Models that need a fall-back have one loss on every engine too: caps, one document per forward, router losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import model_folder
from harness import WHOLE_GRIDS, Bench, Run, label, relative

TOLERANCE = 1e-5
KINDS = {
    "gemma2": {},
    "lfm2": {},
    "bloom": {},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}
LAYOUTS = [("zero3", 2), *(pytest.param((engine, 2), marks=pytest.mark.slow) for engine in ("ddp", "fsdp2"))]
QUICK = ("gemma2-packed", "lfm2-rows", "mixtral-packed")
"""What make test runs: a cap, one document a forward, and a router's loss."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: model_folder(kind, folder / kind, **settings) for kind, settings in KINDS.items()}


def cases(models: dict[str, Path], engine: str) -> dict[str, list[str]]:
    """Packed with the smallest micro-batch and rows with a larger one; adapters too."""
    found = {}
    for kind, folder in models.items():
        common = [f'model.path="{folder}"', f'engine.name="{engine}"', "data.max_length=256"]
        found[f"{kind}-packed"] = [*common, "train.global_batch_size=4", "train.micro_batch_size=1"]
        found[f"{kind}-rows"] = [*common, "data.packing=false", "train.micro_batch_size=4"]
    found["lfm2-lora"] = [*found["lfm2-rows"], 'method.name="lora"', "method.r=4"]
    return found if WHOLE_GRIDS else {name: found[name] for name in QUICK}


@pytest.fixture(scope="module")
def solo(bench: Bench, models: dict[str, Path]) -> dict[str, Run]:
    return bench.launch(1, cases(models, "solo"), tag="paths-solo")


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_losses_and_norms_equal_solo(
    layout: tuple[str, int], bench: Bench, models: dict[str, Path], solo: dict[str, Run]
) -> None:
    engine, world = layout
    runs = bench.launch(world, cases(models, engine), tag=f"paths-{engine}")
    worst = {}
    for name, run in runs.items():
        columns = ["loss", "grad_norm", *(["router_loss"] if name.startswith("mixtral") else [])]
        worst[name] = max(relative(run.column(column), solo[name].column(column)) for column in columns)
        assert run.column("tokens") == solo[name].column("tokens")
        assert run.evals[-1]["eval_loss"] == pytest.approx(solo[name].evals[-1]["eval_loss"], rel=TOLERANCE)
    assert max(worst.values()) < TOLERANCE, worst
    assert all(value > 0 for value in runs["mixtral-packed"].column("router_loss"))
