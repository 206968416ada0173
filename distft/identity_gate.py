"""Before the first update the policy is the reference: checked on real rows, and with it how both are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distft.core.errors import NumericError
from distft.core.types import Batch, Engine, Policy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RTOL = 1e-5
"""Relative tolerance of a document's log-probability, in fp32: both sums are of the same numbers."""
HALF_TOKEN = 0.05
"""In 16 bits: what a token's log-probability may differ by in another packing, and n tokens by sqrt(n) times that."""


def refuse_other_policy(
    engine: Engine, policy: Policy, reference: Callable[[Batch], Tensor], batch: Batch, dtype: torch.dtype
) -> None:
    """Compare the policy's log-probabilities with the reference's on one micro-batch; collective.

    Args:
        engine: holds the weights that training starts from.
        policy: the model under this engine.
        reference: micro-batch on the device -> [S].
        batch: of the run's first step.
        dtype: what the model computes in.

    Raises:
        NumericError: on all ranks; names the row, the first token and the side that differ.
    """
    import torch

    on_device = engine.place(batch)
    with engine.evaluating():
        mine_S, theirs_S = policy.token_logprobs(on_device), reference(on_device)
    mine_D, theirs_D = on_device.sum_by_document(mine_S), on_device.sum_by_document(theirs_S)
    count_D = on_device.sum_by_document(torch.ones_like(mine_S))
    exact = dtype == torch.float32
    allowed_D = RTOL * theirs_D.abs().clamp(min=1) if exact else HALF_TOKEN * count_D.sqrt()
    wrong = torch.nonzero(~((mine_D - theirs_D).abs() <= allowed_D)).flatten().tolist()
    difference = ""
    if wrong:
        document, counts = wrong[0], [int(count) for count in count_D.tolist()]
        begin = sum(counts[:document])
        gap_S = (mine_S - theirs_S).abs()[begin : begin + counts[document]]
        limit = RTOL * 10 if exact else HALF_TOKEN
        first = next((index for index, gap in enumerate(gap_S.tolist()) if not gap <= limit), 0)
        size = on_device.group_sizes[0] if on_device.group_sizes else 1
        side = ("chosen", "rejected")[document % 2] if size == 2 else f"document {document % size + 1}"
        difference = (
            f"{batch.sample_ids[document // size]}, {side}: trained token {first + 1} has log-probability "
            f"{mine_S[begin + first]:.6g} under the policy and {theirs_S[begin + first]:.6g} under the reference"
        )
    answers = [answer for answer in engine.gather(difference) if answer]
    if answers:
        raise NumericError(
            f"before the first update the policy is not its reference ({answers[0]}): the loss would not be the one "
            "that the recipe names. Dropout, adapters that do not start as nothing, or a kernel that depends on the "
            "other rows of a micro-batch do this"
        )
