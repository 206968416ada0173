"""Serves lm-eval's requests, which are text, with a `Generator` (see `distft.scores.harness.TextGenerator`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from distft.core.errors import MachineError, Preempted
from distft.data.render import Renderer
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.generator import Generator

T = TypeVar("T")


class LmEvalBackend:
    """Tokenizes and answers requests; collective: every rank asks the same, and gets every answer."""

    def __init__(
        self,
        generator: Generator,
        renderer: Renderer,
        *,
        seed: int,
        as_chat: bool = False,
        batch_size: int | None = None,
    ) -> None:
        """`as_chat`: texts come with a chat template's special tokens."""
        self._generator, self._renderer, self._seed = generator, renderer, seed
        self._as_chat, self._batch_size = as_chat, batch_size
        self.seconds, self.answer_tokens, self.cut_prompts = 0.0, 0, 0
        """So far."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood after its context, and whether the model would write it.

        Raises:
            Preempted: asked to stop.
        """
        # White space goes over to the continuation in chats too, where the library's figures have it.
        stripped_pairs = [
            (bare := context.rstrip(), context[len(bare) :] + continuation) for context, continuation in pairs
        ]
        tokens = [
            self._renderer.pair(context, continuation, as_chat=self._as_chat)
            for context, continuation in stripped_pairs
        ]
        return self._loglikelihoods(
            [(self._truncate(context, len(continuation)), continuation) for context, continuation in tokens]
        )

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text, in windows as lm-eval cuts them (`get_rolling_token_windows`).

        Raises:
            Preempted: asked to stop.
        """
        windows = [self._windows(text) for text in texts]
        results = iter(self._loglikelihoods([window for text_windows in windows for window in text_windows]))
        return [sum(next(results)[0] for _ in text_windows) for text_windows in windows]

    def generate(
        self, prompts: Sequence[str], *, stop: tuple[str, ...], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """Return what the model writes after each prompt.

        Raises:
            Preempted: asked to stop.
        """
        ids = [self._renderer.tokens(prompt, as_chat=self._as_chat) for prompt in prompts]
        requests = [
            Prompt(seed_key=prompt, ids=self._truncate(token_ids, max_new_tokens))
            for prompt, token_ids in zip(prompts, ids, strict=True)
        ]
        how = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            seed=self._seed,
            batch_size=self._batch_size,
        )
        written = _all(self._generator.generate(requests, how))
        self.seconds += self._generator.seconds
        self.answer_tokens += sum(completion.num_tokens for completion in written)
        return [completion.text for completion in written]

    def _loglikelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        results = _all(self._generator.loglikelihood(pairs, batch_size=self._batch_size))
        self.seconds += self._generator.seconds
        return results

    def _truncate(self, ids: Sequence[int], room: int) -> Sequence[int]:
        kept = self._generator.truncate_prompt(ids, room)
        self.cut_prompts += len(kept) < len(ids)
        return kept

    def _windows(self, text: str) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return windows that hold every token once; a later window sees as much before it as the model reads.

        A start token that the tokenizer adds counts as one of the text's, after another: as in lm-eval, whose figures
        these are.

        Raises:
            MachineError: texts begin with a method's virtual tokens, which have no likelihood.
        """
        if self._renderer.prefix:
            raise MachineError(
                "the likelihood of whole texts cannot be measured behind virtual tokens: leave this task out"
            )
        before, _ = self._renderer.pair("", text)
        ids = self._renderer.tokens(text)
        most = self._generator.longest or len(ids)
        first = min(most, len(ids))
        windows: list[tuple[Sequence[int], Sequence[int]]] = [(before[:1], ids[:first])]
        for begin in range(first, len(ids), most):
            end = min(begin + most, len(ids))
            windows.append((ids[max(0, end - most - 1) : begin], ids[begin:end]))
        return windows


def _all(results: list[T] | None) -> list[T]:
    if results is None:
        raise Preempted("stopped while answering; sets that were finished are kept")
    return results
