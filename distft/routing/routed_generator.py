"""Answers each prompt with the adapter that a router chooses for it: what `distft eval` asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.generation.local import local_generator
from distft.routing.router import RoutedPool
from distft.routing.token_generator import TokenRoutedGenerator


class RoutedGenerator:
    """Implements what evaluation sets ask of a generator; prompts of one choice are answered together."""

    def __init__(
        self, routed: RoutedPool, tokenizer: Any, stop_ids: Sequence[int], *, stop: Callable[[], bool]
    ) -> None:
        self._routed = routed
        self._inner = local_generator(routed.pool.model, tokenizer, stop_ids, stop=stop)
        self._by_token = TokenRoutedGenerator(routed, tokenizer, stop_ids, stop=stop)
        self.seconds = 0.0
        self.chosen: dict[str, int] = {}
        """How often each adapter, or sum of adapters, was chosen: for requests, or for tokens."""

    @property
    def share(self) -> float:
        """Share of a batch that is answered at once: less after memory ran out."""
        return self._inner.share

    def truncate_prompt(self, ids: Sequence[int], room: int) -> Sequence[int]:
        """Cut the start of a prompt so that `room` tokens are left for its answer."""
        return self._inner.truncate_prompt(ids, room)

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        """Generate an answer to each prompt, in order; None when it was asked to stop before the end."""
        if self._routed.how.per == "token":
            made = self._by_token.generate(prompts, how)
            self.seconds, self.chosen = self._by_token.seconds, self._by_token.chosen
            return made
        groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            weights = tuple(sorted(self._routed.choose(prompt.ids).items()))
            groups.setdefault(weights, []).append(place)
            label = "+".join(name for name, _ in weights) or "base"
            self.chosen[label] = self.chosen.get(label, 0) + 1
        answers: dict[int, Completion] = {}
        self.seconds = 0.0
        for weights, places in groups.items():
            with self._routed.using(dict(weights)):
                made = self._inner.generate([prompts[place] for place in places], how)
            if made is None:
                return None
            self.seconds += self._inner.seconds
            answers |= dict(zip(places, made, strict=True))
        return [answers[place] for place in range(len(prompts))]

    def loglikelihood(self, pairs: Any, *, batch_size: int | None = None) -> Any:
        """Weigh no given answers.

        Raises:
            RecipeError: always: which adapter should weigh them is not decided by their text.
        """
        problem = Problem(message="a router weighs no given answers", fix="evaluate sets that write, or one adapter")
        raise RecipeError("distft eval", [problem])
