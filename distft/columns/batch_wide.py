"""What objectives on single answers take over a whole global batch, in a pass of its own without gradients.

Every document of the batch gets the same number. Packing, micro-batches, accumulation, ranks and engine do not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distft.columns.spec import ColumnInputs, ColumnSpec, Supplier, TensorOf
from distft.core.phase import PHASE
from distft.core.types import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from distft.columns.stored_logprobs import RowPass


def _mismatched(rows: RowPass) -> RowPass:
    from distft.data.mismatched import MismatchedRows

    return rows.over(MismatchedRows(rows.prepared, rows.batches(), max_length=rows.max_length))


def _open_kl(inputs: ColumnInputs) -> Supplier:
    """Return the KL of policy and reference: the mean log-ratio of answers to other prompts, at least 0.

    Each prompt is followed by the answer of the row before it in the global batch. Source:
    https://arxiv.org/abs/2402.01306 section 4.2
    """
    ratio_D = _log_ratio(inputs)

    def begin(micros: Sequence[Batch]) -> TensorOf:
        described = [(micro.position, micro.rows, micro.rows_sha256) for micro in micros]
        of_all = [entry for of_rank in inputs.engine.gather(described) for entry in of_rank]
        sha256 = next((sha256 for _, rows, sha256 in of_all if rows), "")
        if not sha256:  # a rehearsal: as much work, and no answers
            for micro in micros:
                ratio_D(inputs.engine.place(micro))
            return _everywhere(0.0)
        derived = inputs.derived[sha256]
        rows = derived.in_order([(position, rows) for position, rows, _ in of_all])
        indices = derived.prepared.of_batch(rows)  # type: ignore[attr-defined]  # what `_mismatched` has made
        sums: list[Tensor] = []
        for micro in derived.steps(indices):
            PHASE.enter("columns")
            sums.append(ratio_D(inputs.engine.place(micro)).sum())
        (total,) = inputs.engine.sum_over_ranks(float(sum(sums)))  # the accelerator is waited for once
        return _everywhere(max(0.0, total / len(rows)))

    return begin


def _open_shift(inputs: ColumnInputs) -> Supplier:
    """Return half the sum of the mean log-ratios of good and of bad answers; of one kind alone where there is no other.

    Source: https://arxiv.org/abs/2404.04656 equation 8. It is of the global batch, not a running mean, so that it
    depends on nothing that came before.
    """
    ratio_D = _log_ratio(inputs)

    def begin(micros: Sequence[Batch]) -> TensorOf:
        sums = [0.0] * 4
        for micro in micros:
            PHASE.enter("columns")
            on_device = inputs.engine.place(micro)
            ratio, good = ratio_D(on_device), on_device.columns["desirable_G"] > 0
            bad = ~good
            mine = [(ratio * good).sum(), (ratio * bad).sum(), good.sum(), bad.sum()]
            sums = [total + float(value) for total, value in zip(sums, mine, strict=True)]
        good_sum, bad_sum, num_good, num_bad = inputs.engine.sum_over_ranks(*sums)
        means = [total / count for total, count in ((good_sum, num_good), (bad_sum, num_bad)) if count]
        return _everywhere(sum(means) / max(1, len(means)))

    return begin


def _log_ratio(inputs: ColumnInputs) -> Callable[[Batch], Tensor]:
    """Return micro-batch on the device -> fp64 [D]: log-probability under the policy less the reference's."""
    reference, policy = inputs.reference(), inputs.policy
    return lambda batch: batch.sum_by_document(policy.token_logprobs(batch) - reference(batch))


def _everywhere(value: float) -> TensorOf:
    import torch

    return lambda batch: torch.full((batch.num_documents,), value, dtype=torch.float64, device=batch.labels_T.device)


_READS: dict[str, Any] = {"reads_reference": True, "policy_forwards": 1, "reference_forwards": 1}
KL = ColumnSpec(name="kl_D", open=_open_kl, derive=_mismatched, **_READS)
SHIFT = ColumnSpec(name="shift_D", open=_open_shift, **_READS)
