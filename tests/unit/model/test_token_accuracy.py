"""An evaluation's share of likeliest tokens is that of a plain look at all logits, and its loss stays bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank
from tiny import batch, build, documents

from distft.core.types import IGNORE, Batch
from distft.evaluation.held_out import held_out_loss
from distft.model import cross_entropy, token_accuracy
from distft.model.logit_rule import LogitRule
from distft.model.paths import ForwardPath
from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective

LORA = {"r": 4, "target_modules": ["lm_head", "q_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "chunks": {},
    "full": {"cross_entropy": "full"},
    "adapter on the head": {"method": "lora", "params": LORA},
    "the model's own head": {"computed_by": ForwardPath(head="own")},
}


def built(folder: Path, **chosen: Any) -> Any:
    """A model that evaluates, its adapter not zero."""
    model = build(folder, **chosen).module.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.5)
    return model


def plain_model(folder: Path, **chosen: Any) -> Any:
    """The same, to be asked for all its logits as transformers gives them."""
    model = built(folder, **chosen)
    model.transformer.set_attn_implementation("eager")
    return model


def half_right(model: Any, rows: list[list[int]]) -> tuple[Batch, int]:
    """A batch whose every second label is what the model finds likeliest, and how many are in all."""
    made = batch(rows, trained_from=2)
    labels, hits, begin = made.labels_T.clone(), 0, 0
    for ids in rows:
        with torch.no_grad():
            likeliest = model.transformer(torch.tensor([ids])).logits[0].argmax(-1)
        for place, token in enumerate(likeliest.tolist()):
            at = begin + place
            if labels[at] == IGNORE:
                continue
            if place % 2:
                labels[at] = token
            hits += int(labels[at] == token)
        begin += len(ids)
    return replace(made, labels_T=labels), hits


@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * 256 * 7], ids=["at once", "in chunks"])
@pytest.mark.parametrize("case", CASES)
def test_hits_are_those_of_all_logits_and_the_loss_is_the_same(
    tiny_config: Path, case: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(tiny_config, **CASES[case])
    made, hits = half_right(plain_model(tiny_config, **CASES[case]), documents([30, 7, 18, 5, 21]))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    policy = ModelPolicy(model)
    with torch.no_grad():
        plain, measured = policy.loss_sum(made), policy.measuring().loss_sum(made)
        nothing = policy.measuring().loss_sum(
            replace(made, labels_T=torch.full_like(made.labels_T, IGNORE), num_supervised=0)
        )
    assert plain.loss_sum == measured.loss_sum, "bit for bit"
    assert "token_accuracy" not in plain.figures
    assert measured.figures["token_accuracy"].tolist() == [hits, made.num_supervised]
    assert made.num_supervised // 3 < hits < made.num_supervised
    assert nothing.figures["token_accuracy"].tolist() == [0, 0]
    assert nothing.loss_sum == 0


@pytest.mark.parametrize(
    "rule", [LogitRule(), LogitRule(scale=0.5, cap=3.0, hidden_scale=2.0)], ids=["plain", "capped"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_loss_is_counted_beside(rule: LogitRule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that shows no logits, as the fused kernel."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(37, 16).to(dtype), torch.randn(300, 16).to(dtype), torch.randn(300).to(dtype)
    logits = rule.logits(hidden, weight, bias)
    labels = torch.where(torch.arange(37) % 3 == 0, logits.argmax(1), torch.randint(0, 300, (37,)))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 300 * 8)

    def other(*given: Any) -> torch.Tensor:
        return cross_entropy.chunked_sum(*given)

    for loss in (cross_entropy.chunked_sum, cross_entropy.full_loss, cross_entropy.chunked_loss, other):
        pair = token_accuracy.Counted(loss)(hidden, weight, bias, labels, rule)
        assert pair.shape == (1, 2)
        assert pair[0, 0] == loss(hidden, weight, bias, labels, rule).sum()
        assert pair[0, 1] == (logits.argmax(1) == labels).sum()


class OneProcess(OneRank):
    """As much of an engine as an evaluation asks of it."""

    device = torch.device("cpu")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def place(self, made: Batch) -> Batch:
        return made

    def sum_over_ranks(self, *values: float) -> list[float]:
        return list(values)


def test_an_evaluation_says_it_of_all_its_batches(tiny_config: Path) -> None:
    model, plain = built(tiny_config), plain_model(tiny_config)
    spec = OBJECTIVES["sft"]
    objective = Objective(spec=spec, params=spec.params(), policy=ModelPolicy(model))
    batches, hits = zip(*(half_right(plain, documents([12, 9], seed=seed)) for seed in (1, 2)), strict=True)
    result = held_out_loss(OneProcess(), objective, batches, stop=lambda: False)  # type: ignore[arg-type]
    assert result is not None
    tokens = sum(made.num_supervised for made in batches)
    assert result.figures["eval_token_accuracy"] == sum(hits) / tokens
    assert result.figures["eval_tokens"] == tokens
