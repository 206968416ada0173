"""The policy must be its reference before the first update; what makes it another one is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, build, documents
from torch import Tensor

from distft.core.errors import NumericError
from distft.core.types import Batch
from distft.identity_gate import refuse_other_policy
from distft.model.policy import ModelPolicy


class OneProcess:
    """What the gate asks of an engine."""

    def place(self, batch: Batch) -> Batch:
        return batch

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return torch.no_grad()  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def pairs() -> Batch:
    rows = documents([9, 6, 12, 7])
    return replace(batch(rows, trained_from=3), group_sizes=(2, 2), sample_ids=("a.jsonl row 1", "a.jsonl row 2"))


def gate(folder: Path, pairs: Batch, reference: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
    policy = ModelPolicy(build(folder).module)
    engine: Any = OneProcess()
    refuse_other_policy(engine, policy, lambda given: reference(policy.token_logprobs(given).detach()), pairs, dtype)


def test_the_same_model_passes(tiny_config: Path, pairs: Batch) -> None:
    gate(tiny_config, pairs, lambda logprob_S: logprob_S)
    gate(tiny_config, pairs, lambda logprob_S: logprob_S * (1 + 1e-7))
    gate(tiny_config, pairs, lambda logprob_S: logprob_S.bfloat16().float(), torch.bfloat16)


@pytest.mark.parametrize(("document", "row", "side"), [(1, 1, "rejected"), (2, 2, "chosen")])
def test_the_row_the_side_and_the_token_are_named(
    tiny_config: Path, pairs: Batch, document: int, row: int, side: str
) -> None:
    counts = pairs.sum_by_document(torch.ones(pairs.num_supervised)).long().tolist()

    def other(logprob_S: Tensor) -> Tensor:
        changed = logprob_S.clone()
        changed[sum(counts[:document]) + 1] += 0.01
        return changed

    with pytest.raises(
        NumericError, match=rf"a\.jsonl row {row}, {side}: trained token 2 has log-probability"
    ) as caught:
        gate(tiny_config, pairs, other)
    assert caught.value.exit_code == 5


def test_a_number_that_is_none_does_not_pass(tiny_config: Path, pairs: Batch) -> None:
    with pytest.raises(NumericError, match="row 1, chosen"):
        gate(tiny_config, pairs, lambda logprob_S: torch.full_like(logprob_S, float("nan")))


def test_sixteen_bits_are_no_excuse_for_another_model(tiny_config: Path, pairs: Batch) -> None:
    with pytest.raises(NumericError, match="before the first update the policy is not its reference"):
        gate(tiny_config, pairs, lambda logprob_S: logprob_S - 0.3, torch.bfloat16)
