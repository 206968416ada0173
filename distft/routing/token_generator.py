"""Answers prompts with a choice among adapters before each token: the base reads along, and the router looks at it.

The base alone and the model with its adapters each keep a cache, so a token costs two forwards of one position. The
prompt is read by what is chosen at its end, as by a router of requests; what is in the cache stays as it was read.

Shape letters: L positions of one forward, D width of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.generation.sampling import draws, next_tokens
from distft.routing.features import pooled
from distft.routing.router import RoutedPool

Weights = dict[str, float]


class TokenRoutedGenerator:
    """Generates one answer after another, each token with the adapters that the router chooses for it."""

    def __init__(
        self,
        routed: RoutedPool,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        stop: Callable[[], bool] = lambda: False,
        heard: Callable[[int, int], None] | None = None,
    ) -> None:
        self._routed, self._tokenizer, self._stop, self._heard = routed, tokenizer, stop, heard
        self._stop_ids = frozenset(stop_ids)
        self.seconds = 0.0
        """That the last call took."""
        self.chosen: dict[str, int] = {}
        """Tokens that each adapter, or sum of adapters, has written."""

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        """Generate an answer to each prompt, in order; None when it was asked to stop before the end."""
        began, made = time.monotonic(), list[Completion]()
        for place, prompt in enumerate(prompts):
            if self._stop():
                return None
            made.append(self._answer(place, prompt, how))
        self.seconds = time.monotonic() - began
        return made

    @torch.no_grad()
    def _answer(self, place: int, prompt: Prompt, how: SamplingParams) -> Completion:
        device = next(self._routed.pool.model.parameters()).device
        draw_1N = draws([prompt.seed_key], how.max_new_tokens, how.seed, device) if how.temperature else None
        reader, cache = _BaseReader(self._routed), None
        ids, kept, logprobs, text, ended = list(prompt.ids), list[int](), list[float](), "", False
        for number in range(how.max_new_tokens):
            weights = self._routed.choose_by(reader.read(ids))
            with self._routed.using(weights) as model:
                out = model(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits_1V = out.logits[:, -1]
            token_1, logprob_1 = next_tokens(
                logits_1V,
                None if draw_1N is None else draw_1N[:, number],
                how.temperature,
                how.top_p,
                logprobs=how.logprobs,
            )
            logprobs += [] if logprob_1 is None else [float(logprob_1)]
            token = int(token_1)
            kept.append(token)
            label = "+".join(sorted(weights)) or "base"
            self.chosen[label] = self.chosen.get(label, 0) + 1
            if self._heard is not None:
                self._heard(place, token)
            if ended := token in self._stop_ids:
                break
            text = self._tokenizer.decode(kept, skip_special_tokens=True)
            if ends := [found for stop in how.stop if (found := text.find(stop)) >= 0]:
                text, ended = text[: min(ends)], True
                break
            ids = [token]
        return Completion(
            text=text, ids=tuple(kept), logprobs=tuple(logprobs), num_tokens=len(kept), ended=ended
        )  # fmt: skip


class _BaseReader:
    """Reads tokens with the base alone, and gives what the router looks at behind the last of them."""

    def __init__(self, routed: RoutedPool) -> None:
        self._routed = routed
        self._cache: Any = None
        self._sum_D: Tensor | None = None
        self._count = 0

    def read(self, ids: Sequence[int]) -> Tensor:
        """Return features [D] of everything that was read, these tokens included."""
        with self._routed.pool.using(None) as model:
            core = model.get_base_model()
            device = next(model.parameters()).device
            out = core(
                input_ids=torch.tensor([list(ids)], device=device),
                past_key_values=self._cache,
                use_cache=True,
                output_hidden_states=True,
            )
        self._cache = out.past_key_values
        states = out.hidden_states
        state_LD = states[round(self._routed.layer * (len(states) - 1))][0].float()
        features_LD = pooled(state_LD, self._routed.how.pooling, self._sum_D, self._count)
        sum_D = state_LD.sum(0)
        self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
        self._count += len(ids)
        return features_LD[-1].cpu()
