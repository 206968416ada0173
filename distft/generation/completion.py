"""Defines a generator's input and output: prompt, sampling parameters, completion. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
    policy: str = ""
    """Name of the weights that a server has written it with, with their digest; empty: the engine's own."""


def completion_of(
    ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    ends_with_token: bool,
    ended: bool,
    decode: Callable[[list[int]], str],
    stop: Sequence[str],
    policy: str = "",
) -> Completion:
    """Return the completion of these tokens; its text ends before the first of the texts `stop`.

    Args:
        ids: of the answer, with the token that ended it.
        logprobs: of each token, or none.
        ends_with_token: the last token is one that ends answers, and is no part of the text.
        ended: it ended by itself, not by the limit.
        decode: tokens -> text, special tokens left out.
        stop: texts that end an answer.
        policy: what has written it, where that is a server.
    """
    text = decode(list(ids[:-1] if ends_with_token else ids))
    ends = [position for stop_text in stop if (position := text.find(stop_text)) >= 0]
    return Completion(
        text=text[: min(ends)] if ends else text,
        ids=tuple(ids),
        logprobs=tuple(logprobs),
        num_tokens=len(ids),
        ended=ended,
        policy=policy,
    )


def seed_digest(seed: int, seed_key: str) -> bytes:
    """Return the 32 bytes that all draws of a prompt follow from, whatever writes its answer."""
    return hashlib.sha256(f"{seed}:{seed_key}".encode()).digest()
