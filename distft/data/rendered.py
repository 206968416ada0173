"""A row as tokens, with the ones to train.

Shape letter: T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One sample as tokens."""

    ids_T: np.ndarray
    """int32."""
    trained_T: np.ndarray
    """bool; the tokens to be predicted. The first token is never a label, whatever this says."""
    diverged: bool = False
    """The prompt's tokens alone are not the first tokens of prompt + completion: they merge at the boundary."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What is to be known of the row: kind -> an example."""
    empty: bool = False
    """There is nothing to learn: the answers are empty."""
    stop_id: int = -1
    """The trained token that ends the answer; -1: none."""
    documents: tuple[int, ...] = ()
    """Tokens of each document of a group, which lie end to end; empty: it is one document."""
    values: tuple[float, ...] = ()
    """See `Group.values`."""

    def after(self, prefix: Sequence[int]) -> Rendered:
        """Return the same document behind other tokens, which are not trained."""
        if not prefix:
            return self
        ids_T = np.concatenate([np.array(prefix, np.int32), self.ids_T])
        trained_T = np.concatenate([np.zeros(len(prefix), np.bool_), self.trained_T])
        return replace(self, ids_T=ids_T, trained_T=trained_T)

    @classmethod
    def group(cls, documents: Sequence[Rendered], values: tuple[float, ...] = ()) -> Rendered:
        """Return the documents of a group end to end."""
        return cls(
            ids_T=np.concatenate([document.ids_T for document in documents]),
            trained_T=np.concatenate([document.trained_T for document in documents]),
            diverged=any(document.diverged for document in documents),
            notes={kind: example for document in documents for kind, example in document.notes.items()},
            empty=any(document.empty for document in documents),
            stop_id=documents[-1].stop_id,
            documents=tuple(len(document.ids_T) for document in documents) if len(documents) > 1 else (),
            values=values,
        )

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first trained one."""
        return self.ids_T[: int(np.argmax(self.trained_T)) if self.trained_T.any() else len(self.ids_T)]

    def labels_of(self) -> list[int]:
        """Return the labels of each document: trained tokens that have a token before them."""
        ends = np.cumsum(self.documents or [len(self.trained_T)])
        return [int(part[1:].sum()) for part in np.split(self.trained_T, ends[:-1])]


def differing_prompts(documents: Sequence[Rendered], decode: Callable[[Sequence[int]], str]) -> str:
    """Describe where the prompt's tokens differ before the answers do; "" when they are the same."""
    first = documents[0].prompt
    for document in documents[1:]:
        second = document.prompt
        if np.array_equal(first, second):
            continue
        pairs = zip(first.tolist(), second.tolist(), strict=False)
        position = next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
        window = slice(max(0, position - 2), position + 3)
        shown = [decode(row.ids_T[window].tolist()) for row in (documents[0], document)]
        return (
            f"the prompt's tokens are not the same before both answers: from token {position + 1} on {shown[0]!r} "
            f"and {shown[1]!r}  the answers must not merge with the prompt or change how it is written"
        )
    return ""
