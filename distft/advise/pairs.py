"""How much of a file of pairs length alone tells apart."""

from __future__ import annotations

from itertools import islice

from distft.data.samples import FormatSpec, RowError
from distft.data.sources import RowSource

_LOOKED_AT = 2000
"""Pairs; the share of so many is known to 2 points."""


def share_longer(source: RowSource, spec: FormatSpec) -> float | None:
    """Return the share of the first pairs whose chosen answer has more characters, one of equal length counting half.

    None where no row is a pair. Rows that the format refuses are left out; `distft check` names them.

    Raises:
        DataError: a file cannot be read.
    """
    shares: list[float] = []
    rows = (payload for file in source.files for _, payload in source.rows(file))
    for payload in islice(rows, _LOOKED_AT):
        try:
            sample = spec.convert(source.renamed(payload))
        except RowError:
            continue
        if len(sample.documents) == 2:
            chosen, rejected = (len(document.question) + len(document.answer) for document in sample.documents)
            shares.append(0.5 if chosen == rejected else float(chosen > rejected))
    return sum(shares) / len(shares) if shares else None
