"""How a model's numbers are computed: the fast path, or the fall-backs that models with rules of their own need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

VARLEN = "distft_varlen"
"""This project's attention over documents laid end to end, in transformers' attention registry; its mask factory does
not know the name and therefore builds no mask."""
SINGLE = "distft_single"
"""The same over one document, whose borders nothing needs to be told."""

Head = Literal["chunked", "own"]
Documents = Literal["packed", "single"]
Generation = Literal["batched", "single", "uncached"]


@dataclass(frozen=True, kw_only=True)
class ForwardPath:
    """What runs between token ids and losses, and between a prompt and its answer."""

    head: Head = "chunked"
    """"chunked": the last hidden states through this project's losses, without logits of [tokens, vocabulary];
    "own": the model's own forward to its logits."""
    attention: str = VARLEN
    """Name in transformers' attention registry."""
    documents: Documents = "packed"
    """"packed": documents laid end to end in one forward; "single": each in a forward of its own."""
    generation: Generation = "batched"
    """"batched": rows of different lengths together, with a cache; "single": row by row, with a cache; "uncached": row
    by row, everything read again for each token."""
    generation_attention: str = "sdpa"
    """Attention while answering, which must take masks and a cache."""
    compiled: bool = False
    """Each block runs as torch.compile makes it."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def describe(self) -> str:
        """Return what differs from the fast path, for logs; empty when nothing does."""
        notes = []
        if self.documents == "single":
            notes.append("one document per forward")
        if self.head == "own":
            notes.append("the model's own head")
        if self.attention in ("sdpa", "eager", "flex_attention"):
            notes.append(f"attention {self.attention}")
        if self.generation != "batched":
            notes.append("answers row by row" + (" without a cache" if self.generation == "uncached" else ""))
        return ", ".join(notes)


def training_paths(attentions: tuple[str, ...]) -> Iterator[ForwardPath]:
    """Yield the paths in the order in which they are tried: the fastest that gives the right numbers is taken."""
    documents: tuple[Documents, ...] = ("packed", "single")
    heads: tuple[Head, ...] = ("chunked", "own")
    for document in documents:
        for attention in attentions:
            for head in heads:
                name = SINGLE if (document, attention) == ("single", VARLEN) else attention
                yield ForwardPath(head=head, attention=name, documents=document)
