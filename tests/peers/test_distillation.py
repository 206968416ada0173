"""An outsider agrees: the loss of TRL's GKD trainer on the same answers, of the same student and teacher.

Optional: needs TRL in the environment; installs nothing. TRL's `beta` 0 is forward here, 1 reverse, between them the
teacher's share `mixture` of js.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import batch, build, documents

from distft.model.divergence import TeacherHead
from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective

pytest.importorskip("trl", reason="TRL is not installed")

PROMPT, LENGTHS = 3, [30, 7, 18, 5, 12, 21]
CASES = {"forward": (0, 0.5), "reverse": (1, 0.5), "js": (0.3, 0.3)}
"""Divergence -> TRL's beta, and the mixture."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_trl_has_the_same_loss_and_gradient(tiny_config: Path, kind: str) -> None:
    from trl.experimental.gkd import GKDTrainer

    beta, mixture = CASES[kind]
    rows = documents(LENGTHS)
    ours, theirs, wise = (build(tiny_config, seed=seed).module for seed in (1, 1, 2))
    for param in wise.parameters():
        param.data.mul_(1.5)  # surer than the student
    made: Any = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * len(rows))
    head = TeacherHead()
    with torch.no_grad():
        hidden = ModelPolicy(wise, teacher=head).teacher_hidden(made)
    ones = torch.ones(len(rows), dtype=torch.float64)
    columns = {f"{name}_D": ones for name in ("counted", "truncated", "unscored", "writing_s", "judging_s")}
    columns |= {"teacher_hidden_S": hidden, "sampler_logprob_S": torch.zeros(made.num_supervised)}
    spec = OBJECTIVES["distill"]
    params = spec.params(teacher="another model", divergence=kind, mixture=mixture)
    objective = Objective(spec=spec, params=params, policy=ModelPolicy(ours, teacher=head))
    filled = replace(made, columns=columns)
    value = objective.terms(filled).loss_sum / objective.denominator([filled])
    value.backward()

    student, teacher = theirs.transformer, wise.transformer
    for lm in (student, teacher):
        lm.set_attn_implementation("eager")
    longest = max(LENGTHS)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    there = torch.arange(longest)[None] < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~there, -100)
    labels[:, :PROMPT] = -100
    peer: Any = SimpleNamespace(
        teacher_model=teacher, beta=beta, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
    )  # fmt: skip
    given = {"input_ids": ids, "attention_mask": there.long(), "labels": labels}
    expected = GKDTrainer.compute_loss(peer, student, given)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    norm = math.sqrt(sum(param.grad.square().sum().item() for param in student.parameters()))
    assert norm > 1e-3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm().item() <= 1e-4 * norm
