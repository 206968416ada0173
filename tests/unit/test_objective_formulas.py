"""Every preference objective equals a plain loop: one document at a time through transformers, the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, build, documents
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective

PROMPT, LENGTHS = 3, [30, 7, 18, 5, 12, 21]
REFERENCE = torch.tensor([-101.0, -15.0, -70.0, -9.0, -44.0, -90.0], dtype=torch.float64)
GOOD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
BY_TOKEN = [torch.full((n - PROMPT,), float(sum_ / (n - PROMPT))) for n, sum_ in zip(LENGTHS, REFERENCE, strict=True)]
"""The reference's log-probability of each token."""
KL, SHIFT, MARGIN = 0.7, -1.3, torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)


def pairs_of(value: Tensor) -> tuple[Tensor, Tensor]:
    return value[0::2], value[1::2]


def orpo(logprob: Tensor, length: Tensor, beta: float) -> Tensor:
    """Equations 6 and 7, by odds."""
    good, bad = pairs_of(logprob / length)
    odds = (good.exp() / (1 - good.exp())) / (bad.exp() / (1 - bad.exp()))
    return (-good + beta * -(odds / (1 + odds)).log()).mean()


def simpo(logprob: Tensor, length: Tensor, beta: float, gamma: float) -> Tensor:
    good, bad = pairs_of(logprob / length)
    return softplus(-(beta * (good - bad) - gamma)).mean()


def cpo(logprob: Tensor, length: Tensor, beta: float, weight: float) -> Tensor:
    good, bad = pairs_of(logprob)
    return (softplus(-beta * (good - bad)) - weight * good / length[0::2]).mean()


def dpo(logprob: Tensor, length: Tensor, beta: float, smoothing: float, weight: float) -> Tensor:
    good, bad = pairs_of(logprob - REFERENCE)
    z = beta * (good - bad)
    loss = -(1 - smoothing) * (1 / (1 + (-z).exp())).log() - smoothing * (1 / (1 + z.exp())).log()
    return (loss - weight * logprob[0::2] / length[0::2]).mean()


def ld_dpo(tokens: list[Tensor], beta: float, alpha: float) -> Tensor:
    """Equation 11: tokens beyond the shorter answer of a pair weigh alpha, in policy and reference."""
    losses = []
    for good, bad, ref_good, ref_bad in zip(tokens[0::2], tokens[1::2], BY_TOKEN[0::2], BY_TOKEN[1::2], strict=True):
        both = min(len(good), len(bad))
        ratio = [
            (mine - ref)[:both].sum() + alpha * (mine - ref)[both:].sum()
            for mine, ref in ((good, ref_good), (bad, ref_bad))
        ]
        losses.append(softplus(-beta * (ratio[0] - ratio[1])))
    return torch.stack(losses).mean()


def kto(logprob: Tensor, length: Tensor, beta: float, good: float, bad: float) -> Tensor:
    ratio = logprob - REFERENCE
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(ratio)):
        if GOOD[row]:
            total = total + good * (1 - (beta * (ratio[row] - KL)).sigmoid())
        else:
            total = total + bad * (1 - (beta * (KL - ratio[row])).sigmoid())
    return total / len(ratio)


def bco(logprob: Tensor, length: Tensor, beta: float) -> Tensor:
    reward = beta * (logprob - REFERENCE) - beta * SHIFT
    return torch.where(GOOD > 0, -logsigmoid(reward), -logsigmoid(-reward)).mean()


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Tensor, list[Tensor]], Tensor]]] = {
    "orpo": ("orpo", {"beta": 0.5}, lambda p, n, t: orpo(p, n, 0.5)),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 1.0}, lambda p, n, t: simpo(p, n, 2.0, 1.0)),
    "cpo": ("cpo", {"beta": 0.2, "sft_weight": 0.7}, lambda p, n, t: cpo(p, n, 0.2, 0.7)),
    "dpo": ("dpo", {"beta": 0.2}, lambda p, n, t: dpo(p, n, 0.2, 0, 0)),
    "dpo, smoothed": ("dpo", {"beta": 0.2, "label_smoothing": 0.1}, lambda p, n, t: dpo(p, n, 0.2, 0.1, 0)),
    "dpo, with sft": ("dpo", {"beta": 0.2, "sft_weight": 0.3}, lambda p, n, t: dpo(p, n, 0.2, 0, 0.3)),
    "dpo, length": ("dpo", {"beta": 0.2, "ld_alpha": 0.3}, lambda p, n, t: ld_dpo(t, 0.2, 0.3)),
    "kto": ("kto", {"beta": 0.2, "undesirable_weight": 1.5}, lambda p, n, t: kto(p, n, 0.2, 1.0, 1.5)),
    "bco": ("bco", {"beta": 0.2}, lambda p, n, t: bco(p, n, 0.2)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_a_plain_loop(tiny_config: Path, case: str) -> None:
    name, params, plain = CASES[case]
    spec = OBJECTIVES[name]
    rows = documents(LENGTHS)
    ours, theirs = build(tiny_config).module, build(tiny_config).module
    theirs.transformer.set_attn_implementation("eager")
    made = batch(rows, trained_from=PROMPT)
    columns = {
        "ref_logprob_D": REFERENCE,
        "ref_logprob_S": torch.cat(BY_TOKEN),
        "kl_D": torch.full((6,), KL),
        "shift_D": torch.full((6,), SHIFT),
    }
    size = spec.group_size
    columns |= {"desirable_G": GOOD} if size == 1 else {"margin_G": MARGIN}
    made = replace(made, group_sizes=(size,) * (len(rows) // size), columns=columns)
    objective = Objective(spec=spec, params=spec.params(**params), policy=ModelPolicy(ours))
    loss = objective.terms(made).loss_sum / objective.denominator([made])
    loss.backward()
    tokens = []
    for ids in rows:
        logits = theirs.transformer(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        tokens.append(logits.gather(1, torch.tensor(ids[1:])[:, None])[PROMPT - 1 :, 0])
    lengths = torch.tensor([length - PROMPT for length in LENGTHS], dtype=torch.float64)
    expected = plain(torch.stack([each.sum() for each in tokens]), lengths, tokens)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5), case
    assert math.isfinite(loss.item())
    norm = math.sqrt(sum(param.grad.square().sum().item() for param in theirs.parameters()))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm().item() <= 1e-5 * norm
