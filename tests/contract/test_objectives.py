"""Every objective gives sums: cutting a batch into pieces changes nothing but the number of calls."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import batch, build, documents

from distft.core.step_figures import add_figures, addable, read_figures
from distft.core.types import Batch
from distft.model.causal import CausalLM
from distft.model.divergence import TeacherHead
from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective, ObjectiveSpec

HIDDEN = 16
"""Size of a teacher's hidden states."""


NEEDS = {"distill": {"teacher": "another model"}}
"""What objectives have no default of."""


def over(model: CausalLM, spec: ObjectiveSpec) -> Objective:
    """Return the objective over a model, and a teacher that has left its head."""
    head = TeacherHead()
    head.weight_VE = torch.linspace(-1, 1, 128 * HIDDEN).reshape(128, HIDDEN)
    params = spec.params(**NEEDS.get(spec.name, {}))
    return Objective(spec=spec, params=params, policy=ModelPolicy(model, teacher=head))


def micro(rows: list[list[int]], size: int, first: int) -> Batch:
    """Rows in groups of `size`, with columns that depend on their numbers from `first` on."""
    numbers = torch.arange(first, first + len(rows), dtype=torch.float32)
    columns = {"ref_logprob_D": -20 - numbers, "margin_G": 0.1 * numbers[::size]}
    columns |= {"kl_D": 0 * numbers + 0.5, "shift_D": 0 * numbers - 0.3, "desirable_G": numbers[::size] % 2}
    columns |= {f"{name}_D": 0 * numbers + 1 for name in ("counted", "budget", "truncated", "unscored", "equal")}
    columns |= {"writing_s_D": 0 * numbers + 2, "judging_s_D": 0 * numbers}
    columns |= {"advantage_D": numbers - 1.2, "reward_total_D": numbers}
    for name, base in (("sampler_logprob_S", -5.0), ("ref_logprob_S", -5.5), ("old_value_S", 1.5), ("return_S", 1.0)):
        columns[name] = torch.cat([torch.full((len(row) - 3,), base - i) for i, row in enumerate(rows, first)])
    columns["teacher_hidden_S"] = columns["sampler_logprob_S"][:, None] * torch.linspace(-0.1, 0.1, HIDDEN)
    return replace(batch(rows, trained_from=3), group_sizes=(size,) * (len(rows) // size), columns=columns)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_do_not_change_when_a_batch_is_split(tiny_config: Path, name: str) -> None:
    spec = OBJECTIVES[name]
    rows, size = documents([30, 7, 18, 5]), spec.group_size
    whole = micro(rows, size, 0)
    pieces = [micro(rows[at : at + size], size, at) for at in range(0, len(rows), size)]
    gradients, sums, figures = [], [], []
    for micros in ([whole], pieces):
        model = build(tiny_config, head=spec.head).module
        objective = over(model, spec)
        terms = [objective.terms(one) for one in micros]
        loss = torch.stack([one.loss_sum for one in terms]).sum()
        loss.backward()
        sums.append(loss.item())
        totals: dict[str, torch.Tensor] = {}
        for one in terms:
            add_figures(totals, one.figures)
        figures.append({figure: total.tolist() for figure, total in totals.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert torch.allclose(*gradients, atol=1e-5)
    assert figures[0].keys() == figures[1].keys() == spec.figures(objective.params).keys()
    by_group = [torch.cat([each.by_group[key] for each in terms]) for key in terms[0].by_group]
    assert all(len(value) == len(rows) // size for value in by_group), "one number of each group"
    for figure, (*parts, count) in figures[0].items():
        near = [pytest.approx(part, rel=1e-5, abs=1e-5) for part in (*parts, count)]
        assert figures[1][figure] == near, figure
        assert not parts or figures[1][figure][-1] == count, figure
    assert objective.denominator([whole]) == objective.denominator(pieces) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_nothing_gives_zero_and_a_gradient_of_every_parameter(tiny_config: Path, name: str) -> None:
    spec = OBJECTIVES[name]
    names = micro([[0] * 4] * spec.group_size, spec.group_size, 0).columns
    columns = {name: torch.zeros(0, HIDDEN) if "hidden" in name else torch.zeros(0) for name in names}
    nothing = replace(batch([[0]]), group_sizes=(), columns=columns)
    model = build(tiny_config, head=spec.head).module
    objective = over(model, spec)
    terms = objective.terms(nothing)
    assert terms.loss_sum.item() == 0
    parts = [part for figure in addable(terms.figures, rank=0, world=1) for part in figure.tolist()]
    figures = read_figures(terms.figures, parts, world=1)
    assert all(map(math.isnan, figures.values())), figures
    terms.loss_sum.backward()
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())
