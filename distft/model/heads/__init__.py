"""What stands on a model's last hidden states: one file per head, one line here.

In: a transformers config; out: the model with this head, and what loading, adapters and export must know of it.
"""

from distft.core.registry import Registry
from distft.model.heads import lm, lm_critic, lm_value, scalar
from distft.model.heads.spec import HeadSpec, head_of, put_head

HEADS: Registry[HeadSpec] = Registry("head")
HEADS.add(lm.SPEC)
HEADS.add(lm_value.SPEC)
HEADS.add(lm_critic.SPEC)
HEADS.add(scalar.SPEC)

__all__ = ["HEADS", "HeadSpec", "head_of", "put_head"]
