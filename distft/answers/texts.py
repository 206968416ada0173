"""A speaker that is asked in text: what tasks of lm-eval want (`distft.scores.harness.Answerer`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from distft.answers.speaker import Speaker
from distft.answers.words import Prompt, Writing
from distft.core.errors import Preempted
from distft.data.render import Renderer
from distft.data.samples import PromptCompletion

T = TypeVar("T")


class Texts:
    """Collective, as the speaker is: every rank asks the same, and gets every answer."""

    def __init__(self, speaker: Speaker, renderer: Renderer, *, seed: int) -> None:
        self._speaker, self._renderer, self._seed = speaker, renderer, seed

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what the model would write.

        Raises:
            Preempted: asked to stop.
        """
        tokens = [self._renderer.pair(context, continuation) for context, continuation in pairs]
        return _all(self._speaker.weigh([(self._speaker.fitted(one, len(two)), two) for one, two in tokens]))

    def weigh_whole(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text, in windows as lm-eval cuts them (`get_rolling_token_windows`).

        Raises:
            Preempted: asked to stop.
        """
        windows = [self._windows(text) for text in texts]
        found = iter(_all(self._speaker.weigh([window for own in windows for window in own])))
        return [sum(next(found)[0] for _ in own) for own in windows]

    def write(
        self, prompts: Sequence[str], *, stop: tuple[str, ...], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """What the model writes after each prompt.

        Raises:
            Preempted: asked to stop.
        """
        ids = [self._renderer.ask(PromptCompletion(prompt=prompt, completion=""))[1] for prompt in prompts]
        asked = [
            Prompt(name=prompt, ids=self._speaker.fitted(one, max_new_tokens))
            for prompt, one in zip(prompts, ids, strict=True)
        ]
        how = Writing(max_new_tokens=max_new_tokens, temperature=temperature, stop=stop, seed=self._seed)
        return [written.text for written in _all(self._speaker.write(asked, how))]

    def _windows(self, text: str) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Every token once; a later window sees as much before it as the model reads."""
        (*before,), (*after,) = self._renderer.pair("", text)
        ids = [*before[1:], *after]
        most = self._speaker.longest or len(ids)
        first = min(most, len(ids))
        windows: list[tuple[Sequence[int], Sequence[int]]] = [(before[:1], ids[:first])]
        for begin in range(first, len(ids), most):
            end = min(begin + most, len(ids))
            windows.append((ids[max(0, end - most - 1) : begin], ids[begin:end]))
        return windows


def _all(found: list[T] | None) -> list[T]:
    if found is None:
        raise Preempted("stopped while answering; sets that were finished are kept")
    return found
