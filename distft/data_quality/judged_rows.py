"""Looks at prepared rows that judge answers: pairs of a chosen and a rejected one, or single answers with a label.

Shape letters: N rows, T tokens of one document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distft.data.store import Prepared

SHOWN = 5
"""Contradicting rows that are named."""
LONGER = 0.75
"""Share of pairs with a longer chosen answer from which length alone tells most of them apart."""
BALANCE = (1.0, 4 / 3)
"""Good answers to bad ones, each times its weight, as https://arxiv.org/abs/2402.01306 section 4.2 advises."""


@dataclass(frozen=True, kw_only=True)
class JudgedRows:
    """Figures of the rows of a split."""

    num_chosen: int
    """Chosen or good answers."""
    num_rejected: int
    """Rejected or bad answers."""
    chosen_tokens: float
    """Trained tokens of a chosen or good answer on average."""
    rejected_tokens: float
    longer: float | None
    """Share of pairs whose chosen answer has more tokens; None for single answers."""
    num_repeated: int
    """Rows that an earlier row is the same as: prompt, answers and which is the better."""
    num_contradicting: int
    """Rows that an earlier row says the opposite of."""
    contradicting: tuple[tuple[str, str], ...]
    """Some of them, each with the earlier row."""

    def lines(self) -> Iterator[str]:
        """Yield the figures as lines, and what to do about them."""
        what = ("good", "bad") if self.longer is None else ("chosen", "rejected")
        yield (
            f"{self.num_chosen:,} {what[0]} answers of {self.chosen_tokens:.1f} tokens, {self.num_rejected:,} "
            f"{what[1]} ones of {self.rejected_tokens:.1f}"
        )
        if self.longer is not None:
            yield f"the chosen answer is the longer one in {self.longer:.0%} of the pairs"
            if max(self.longer, 1 - self.longer) >= LONGER:
                side = "longer" if self.longer >= LONGER else "shorter"
                yield (
                    f"  {side} answers win: a policy can learn length alone  use simpo, or dpo with "
                    'loss = "sigmoid_norm" or ld_alpha = 0.5, or match the lengths'
                )
        elif not self.num_chosen or not self.num_rejected:
            yield "  all answers are of one kind: nothing tells good from bad  add some of the other"
        else:
            ratio = self.num_chosen / self.num_rejected
            if not BALANCE[0] <= ratio <= BALANCE[1]:
                weight = (BALANCE[0] / ratio) if ratio < BALANCE[0] else ratio / BALANCE[1]
                name = "desirable_weight" if ratio < BALANCE[0] else "undesirable_weight"
                yield f"  good : bad is {ratio:.2f} : 1; under kto, {name} = {weight:.2f} balances them"
        if self.num_repeated:
            yield f"{self.num_repeated:,} rows are there twice"
        if self.num_contradicting:
            shown = "; ".join(f"{row} and {earlier}" for row, earlier in self.contradicting)
            yield f"{self.num_contradicting:,} rows say the opposite of an earlier one: {shown}"


def judged_rows(rows: Prepared) -> JudgedRows | None:
    """Look at rows that judge answers; None for rows that do not."""
    pairs = rows.group_size == 2
    if not pairs and "desirable_G" not in rows.report.values:
        return None
    lengths: dict[bool, list[int]] = {True: [], False: []}
    longer = repeated = contradicting = 0
    shown: list[tuple[str, str]] = []
    first: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
    for row in range(rows.num_rows):
        documents = list(document_tokens(rows, row))
        for side, _, trained_T in documents:
            lengths[side in ("chosen", "good")].append(int(trained_T[1:].sum()))
        longer += pairs and lengths[True][-1] > lengths[False][-1]
        digests = [hashlib.sha256(ids_T.astype("<i4").tobytes()).digest() for _, ids_T, _ in documents]
        key = b"".join(sorted(digests))
        mine = digests[0] if pairs else documents[0][0].encode()
        met = first[key]
        repeated += mine in met
        opposite = next((earlier for digest, earlier in met.items() if digest != mine), None)
        if opposite is not None:
            contradicting += 1
            if len(shown) < SHOWN:
                shown.append((rows.sample_id(row), rows.sample_id(opposite)))
        met.setdefault(mine, row)
    return JudgedRows(
        num_chosen=len(lengths[True]),
        num_rejected=len(lengths[False]),
        chosen_tokens=_mean(lengths[True]),
        rejected_tokens=_mean(lengths[False]),
        longer=longer / rows.num_rows if pairs else None,
        num_repeated=repeated,
        num_contradicting=contradicting,
        contradicting=tuple(shown),
    )


def document_tokens(rows: Prepared, row: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (what the row says of it, ids_T, trained_T) of each document of a row; "" where it says nothing."""
    ids_T, trained_T = rows.row(row)
    ends = np.cumsum(rows.documents(row))[:-1]
    sides = ("",) * (len(ends) + 1)
    if rows.group_size == 2:
        sides = ("chosen", "rejected")
    elif "desirable_G" in rows.report.values:
        sides = ("good" if rows.values([row])["desirable_G"][0] > 0 else "bad",)
    return zip(sides, np.split(ids_T, ends), np.split(trained_T, ends), strict=True)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
