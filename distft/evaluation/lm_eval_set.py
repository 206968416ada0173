"""Wraps a task of lm-eval as an evaluation set, so that its answers are kept and compared like all others."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from distft.core.errors import Preempted
from distft.core.ranks import on_rank_zero
from distft.evaluation.eval_sets import EvalResult
from distft.evaluation.lm_eval_backend import LmEvalBackend
from distft.scores import MetricInfo
from distft.scores.harness import LmEvalTasks

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.data.render import Renderer
    from distft.generation.generator import Generator


@dataclass(frozen=True, kw_only=True)
class LmEvalSet:
    """An evaluation set that is a task of lm-eval."""

    name: str
    tasks: LmEvalTasks
    renderer: Renderer
    seed: int
    as_chat: bool
    batch_size: int | None = None
    every_steps: int | None = None

    @property
    def rows(self) -> int:
        """See `EvalSet`."""
        return self.tasks.rows

    @property
    def rows_sha256(self) -> str:
        """Hash of the requests in full: rows, those shown before them, and what the library makes of both."""
        return self.tasks.sha256

    @property
    def settings(self) -> dict[str, Any]:
        """See `EvalSet`; scores change with the library's version."""
        return {
            "task": self.tasks.name,
            "lm_eval": version("lm-eval"),
            "seed": self.seed,
            "ask_as": "chat" if self.as_chat else "text",
        }

    @property
    def first_prompt(self) -> str:
        """See `EvalSet`."""
        return self.tasks.prompts[0]

    @property
    def longest_prompt(self) -> int:
        """See `EvalSet`; the answer of a likelihood counts as an answer."""
        return max(
            len(self.renderer.tokens(prompt, as_chat=self.as_chat)) for prompt in set(self.tasks.prompts) if prompt
        )

    def figures(self) -> dict[str, MetricInfo]:
        """See `EvalSet`."""
        return {figure.name: figure for figure in self.tasks.planned}

    def run(self, generator: Generator, engine: Engine) -> EvalResult | None:
        """See `EvalSet`. Every rank runs the library; what rank 0's says is what counts."""
        texts = LmEvalBackend(
            generator, self.renderer, seed=self.seed, as_chat=self.as_chat, batch_size=self.batch_size
        )
        try:
            answers, scored = self.tasks.run(texts)
        except Preempted:
            return None
        scored = on_rank_zero(engine, lambda: scored)
        return EvalResult(
            answers=answers,
            scored=[(self.tasks.name, scored)],
            seconds=texts.seconds,
            answer_tokens=texts.answer_tokens,
            cut_prompts=texts.cut_prompts,
        )
