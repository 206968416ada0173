"""The weighted sum of changes without any loss: the factors side by side, at the sum of the ranks.

PEFT's `cat` does the same, but keeps the scale of rank-stabilised LoRA and so is sqrt(rank) too large there; here
scales and weights go into B, and the result's own scale is 1.
"""

from __future__ import annotations

from distft.merging.hows.linear import weighted_sum
from distft.merging.hows.spec import HowSpec

SPEC = HowSpec(
    name="cat",
    title="weighted sum of the changes, exact: its rank is the sum of the ranks",
    combine=weighted_sum,
    keeps_factors=True,
    keeps_ranks=True,
)
