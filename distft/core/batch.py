"""One micro-batch of documents, and what objectives ask of it.

Shape letters: T tokens of one micro-batch, all its documents laid end to end; S of them supervised; D documents in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained (torch's cross-entropy convention)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch without padding: documents laid end to end, never attending to each other."""

    input_ids_T: Tensor
    """int64; token ids."""
    labels_T: Tensor
    """int64; the id to predict *at* each position (already shifted), IGNORE where nothing is trained.
    The last position of a document is always IGNORE, so no label crosses a document boundary."""
    position_ids_T: Tensor
    """int64; restarts at 0 in every document."""
    cu_seqlens: Tensor
    """int32 [D + 1]; document boundaries, from 0 to T."""
    max_seqlen: int
    """Tokens in the longest document (attention kernels want it on the host)."""
    num_supervised: int
    """Positions with a label."""
    num_tokens: int
    """Real tokens: T without filler."""
    sample_ids: tuple[str, ...] = ()
    """`file row N` of each document, for messages."""
    position: int = 0
    """Packed sequences consumed by the run before this micro-batch's first one: the seed of its dropout."""
    group_sizes: tuple[int, ...] = ()
    """Documents of each group, in order: 1 for supervised fine-tuning, 2 for a pair, n for n samples of one prompt.
    A group is never split over micro-batches. Filler documents come last and belong to no group."""
    rows: tuple[int, ...] = ()  # indices of its groups among the prepared rows with this fingerprint
    rows_sha256: str = ""
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """Further inputs of an objective by name; the name's last letter is the axis: `ref_logprob_D`, `advantage_D`,
    `old_logprob_S`. Filled before the step (see `distft.columns`)."""

    @property
    def num_documents(self) -> int:
        """Documents without filler."""
        return sum(self.group_sizes)

    def sum_by_document(self, values_S: Tensor) -> Tensor:
        """Return fp64 [D], the values of each document's supervised positions added up, filler left out."""
        values_S = values_S.double()  # sums of hundreds, of which differences are taken
        return values_S.new_zeros(self.num_documents).index_add(0, self._document_of_labels(), values_S)

    def by_token(self, values_D: Tensor) -> Tensor:
        """Return [S], each document's value at its supervised positions."""
        return values_D[self._document_of_labels()]

    def _document_of_labels(self) -> Tensor:
        """Return int64 [S], the document of each supervised position."""
        import torch

        at_S = torch.nonzero_static(self.labels_T != IGNORE, size=self.num_supervised).squeeze(1)
        return torch.searchsorted(self.cu_seqlens, at_S.to(self.cu_seqlens.dtype), right=True) - 1

    @property
    def squared_lengths(self) -> Tensor:
        """fp64 []: the squares of documents' lengths added up, filler too.

        Where the batch lies, which is on the host until an engine places it.
        """
        return self.cu_seqlens.diff().double().square().sum()

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's forward: plain tensors and ints, as engines look for tensors in them."""
        return {"labels_T": self.labels_T, "num_supervised": self.num_supervised} | self._documents()

    def _documents(self) -> dict[str, Any]:
        """Return tokens and borders."""
        return {name: getattr(self, name) for name in ("input_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen")}

    def score_inputs(self) -> dict[str, Any]:
        """Return what the forward of a model with a scalar head takes: `ends_D` is each document's last position.

        A micro-batch without documents gives one end, so that all ranks run the same forward.
        """
        ends_D = self.cu_seqlens[1:].long() - 1
        return self._documents() | {"ends_D": ends_D[: max(1, self.num_documents)]}
