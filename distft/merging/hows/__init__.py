"""Ways to combine changes of weights: one file each, one line here."""

from distft.core.registry import Registry
from distft.merging.hows import cat, dare_linear, dare_ties, della, linear, magnitude_prune, slerp, svd, ties
from distft.merging.hows.spec import HowSpec

HOWS: Registry[HowSpec] = Registry("how")
HOWS.add(linear.SPEC)
HOWS.add(cat.SPEC)
HOWS.add(svd.SPEC)
HOWS.add(ties.SPEC)
HOWS.add(dare_linear.SPEC)
HOWS.add(dare_ties.SPEC)
HOWS.add(magnitude_prune.SPEC)
HOWS.add(della.SPEC)
HOWS.add(slerp.SPEC)

__all__ = ["HOWS", "HowSpec"]
