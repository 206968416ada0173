"""The language modelling head beside a critic: what the rest of an answer is expected to be worth, by position."""

from __future__ import annotations

from dataclasses import replace

from distft.model.heads import lm

SPEC = replace(lm.SPEC, name="lm_value", values=True)
