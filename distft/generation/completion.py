"""Defines a generator's input and output: prompt, sampling parameters, completion. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Says how completions are sampled."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end tokens; left out of it."""
    seed: int = 0
    batch_size: int | None = None
    """Rows at a time on one rank; None: as many as fit. It changes no answer."""
    logprobs: bool = False
    """Completions say the log-probability of each of their tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as token ids."""

    seed_key: str
    """Seeds its draws: prompts with equal keys get equal completions."""
    ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A generated text."""

    text: str
    ids: tuple[int, ...] = ()
    """Its tokens, with the one that ended it."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each token at the temperature of the draw, before `top_p`; of the likeliest one (temperature
    0) at temperature 1. Empty unless `SamplingParams.logprobs` asks for them."""
    num_tokens: int
    """Number of tokens with the one that ended it."""
    ended: bool
    """Whether it ended by itself, not by the limit."""
