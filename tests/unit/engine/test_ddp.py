"""Buckets are cut once: a resumed run's first step is like any other step of the run."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import CPU, batch, build, documents

from distft.core.types import LossTerms, TrainState, UpdateRule
from distft.engine.ddp import open_engine
from distft.engine.params import EngineParams
from distft.engine.processes import Processes

ALONE = Processes(rank=0, world=1, local_rank=0, device=CPU, launcher="plain", wants="", joined=False)
RULE = UpdateRule(
    build=lambda groups: torch.optim.AdamW(groups, lr=0.1),
    lr_at=lambda step: 0.1,
    weight_decay=0.0,
    decayed=frozenset(),
    max_grad_norm=None,
)


@pytest.fixture
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_step_has_the_buckets_of_every_other(tiny_config: Path, method: str) -> None:
    engine = open_engine("ddp", EngineParams(), ALONE)
    engine.setup(build(tiny_config, method, fill=False), RULE, micros_per_step=1)
    assert all(p.grad is None or not p.grad.any() for p in engine.model.parameters())
    for step in range(2):
        micro = batch(documents([20, 9], seed=step))
        with engine.accumulating(last=True, seed=0):
            engine.backward(LossTerms(loss_sum=engine.model(**micro.inputs()).sum()), divide_by=27.0, samples=())
        assert engine.step(TrainState(step=step), 27.0, lambda loss: True).updated
    said = engine.model._get_ddp_logging_data()  # as the second forward found it
    assert said["has_rebuilt_buckets"], "the first step ran in the buckets that all others run in"
