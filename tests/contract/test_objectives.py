"""Every objective gives sums: cutting a batch into pieces changes nothing but the number of calls."""

from pathlib import Path

import pytest
import torch
from tiny import batch, build, documents

from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_do_not_change_when_a_batch_is_split(tiny_config: Path, name: str) -> None:
    spec = OBJECTIVES[name]
    rows = documents([30, 7, 18, 5])
    whole, pieces = batch(rows, trained_from=3), [batch([row], trained_from=3) for row in rows]
    gradients, sums = [], []
    for micros in ([whole], pieces):
        model = build(tiny_config).module
        objective = Objective(spec=spec, params=spec.params(), policy=ModelPolicy(model))
        loss = torch.stack([objective.terms(micro).loss_sum for micro in micros]).sum()
        loss.backward()
        sums.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert torch.allclose(*gradients, atol=1e-5)
    assert objective.denominator([whole]) == objective.denominator(pieces) > 0
