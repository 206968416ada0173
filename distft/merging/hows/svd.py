"""The weighted sum of changes cut to a rank, computed from the factors: no matrix of the base's size is made.

The same result as `linear`, whose dense sum also takes changes that are no products (DoRA, IA3, whole tensors).
"""

from __future__ import annotations

from distft.merging.hows.linear import weighted_sum
from distft.merging.hows.spec import HowSpec

SPEC = HowSpec(
    name="svd",
    title="as linear, from the factors alone: fast on large layers, plain LoRA only",
    combine=weighted_sum,
    keeps_factors=True,
)
