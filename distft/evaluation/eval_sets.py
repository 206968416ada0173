"""Defines evaluation sets: questions that a generator answers and scores that judge the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from distft.core.phase import PHASE
from distft.core.ranks import on_rank_zero
from distft.data.questions import Question, rows_hash
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.scores import Answer, MetricInfo, Scorer, ScoreResult, ScoreSpec

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.generation.generator import Generator

Pair: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, as tokens."""


@dataclass(frozen=True, kw_only=True)
class BoundScore:
    """A score with its settings."""

    spec: ScoreSpec
    params: Any
    scorer: Scorer
    """Built before anything is asked, so that what cannot work is said at once."""
    pairs: tuple[tuple[Pair, ...], ...] = field(default=(), repr=False)
    """For a score that weighs choices: for each question, prompt and choice as tokens, a pair for each choice."""


class EvalSet(Protocol):
    """An evaluation set: questions with their scores, wherever they come from."""

    @property
    def name(self) -> str:
        """The name of its files, and the first half of its figures' names."""
        ...

    @property
    def every_steps(self) -> int | None:
        """Steps between two times it is taken during training; None: only before and after."""
        ...

    @property
    def rows(self) -> int:
        """How many questions there are."""
        ...

    @property
    def rows_sha256(self) -> str:
        """Equal for equal questions."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What else answers and marks depend on, besides the model; JSON."""
        ...

    @property
    def first_prompt(self) -> str:
        """The first question, as the model reads it."""
        ...

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        ...

    def figures(self) -> dict[str, MetricInfo]:
        """Return every figure it gives, by name."""
        ...

    def run(self, generator: Generator, engine: Engine) -> EvalResult | None:
        """Ask and judge; collective, and every rank gets what rank 0's judges say.

        Returns:
            None when some rank was asked to stop before the end.

        Raises:
            DistftError: a row cannot be judged, or a judge cannot be asked; PeerEnded on the other ranks.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class RowEvalSet:
    """An evaluation set of rows that the recipe names."""

    name: str
    questions: Sequence[Question]
    scorings: tuple[BoundScore, ...]
    writing: SamplingParams
    every_steps: int | None = None

    @property
    def rows(self) -> int:
        """See `EvalSet`."""
        return len(self.questions)

    @property
    def rows_sha256(self) -> str:
        """See `EvalSet`."""
        return rows_hash(self.questions)

    @property
    def settings(self) -> dict[str, Any]:
        """See `EvalSet`."""
        how = self.writing
        written = {
            "max_new_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "stop": list(how.stop),
            "seed": how.seed,
        }
        judged = [
            {"name": score.spec.name, **score.params.model_dump(mode="json", exclude_none=True)}
            for score in self.scorings
        ]
        return {**(written if self.writes else {}), "scores": judged}

    @property
    def first_prompt(self) -> str:
        """See `EvalSet`."""
        return self.questions[0].prompt

    @property
    def longest_prompt(self) -> int:
        """See `EvalSet`."""
        return max(len(question.ids) for question in self.questions)

    @property
    def writes(self) -> bool:
        """Whether any score looks at text."""
        return any(score.spec.choices is None for score in self.scorings)

    def figures(self) -> dict[str, MetricInfo]:
        """See `EvalSet`."""
        return {figure.name: figure for score in self.scorings for figure in score.spec.figures(score.params)}

    def run(self, generator: Generator, engine: Engine) -> EvalResult | None:
        """See `EvalSet`."""
        questions, room = self.questions, self.writing.max_new_tokens
        texts: list[Completion] | None = [Completion(text="", num_tokens=0, ended=True)] * len(questions)
        seconds, num_truncated = 0.0, 0
        if self.writes:
            prompts = [
                Prompt(seed_key=f"{question.id}\n{question.prompt}", ids=generator.truncate_prompt(question.ids, room))
                for question in questions
            ]
            num_truncated = sum(
                len(prompt.ids) < len(question.ids) for prompt, question in zip(prompts, questions, strict=True)
            )
            texts = generator.generate(prompts, self.writing)
            seconds += generator.seconds
        if texts is None:
            return None
        answers = [
            Answer(
                id=question.id,
                row=question.row,
                reference=question.reference,
                text=completion.text,
                prompt=question.prompt,
                messages=None if question.chat is None else tuple(question.chat.messages),
                tools=None if question.chat is None else question.chat.tools,
            )
            for question, completion in zip(questions, texts, strict=True)
        ]
        scored: list[tuple[str, ScoreResult]] = []
        for scoring in self.scorings:
            judged = answers
            if scoring.spec.choices is not None:
                weighed = _with_loglikelihoods(self, scoring, answers, generator)
                if weighed is None:
                    return None
                judged = answers = weighed
                seconds += generator.seconds
            scored.append((scoring.spec.name, _judged(scoring, judged, engine)))
        tokens = sum(completion.num_tokens for completion in texts)
        return EvalResult(
            answers=answers, scored=scored, seconds=seconds, answer_tokens=tokens, cut_prompts=num_truncated
        )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """An eval_set as one model took it. Answers are in the order of the questions."""

    answers: list[Answer]
    scored: list[tuple[str, ScoreResult]]
    """(name of the score, what it says)."""
    seconds: float
    answer_tokens: int
    cut_prompts: int
    """Prompts that lost their start, being longer than the model reads."""

    @property
    def totals(self) -> dict[str, float]:
        """Figure -> value over all rows."""
        return {name: value for _, score_result in self.scored for name, value in score_result.totals.items()}


def _with_loglikelihoods(
    eval_set: RowEvalSet, scoring: BoundScore, answers: list[Answer], generator: Generator
) -> list[Answer] | None:
    """Add the log-likelihood of each choice to the answers; where nothing was written, the likeliest is the text."""
    pairs = [
        (generator.truncate_prompt(prompt, len(choice)), choice) for row in scoring.pairs for prompt, choice in row
    ]
    results = generator.loglikelihood(pairs, batch_size=eval_set.writing.batch_size)
    if results is None:
        return None
    likelihoods = iter(results)
    weighed = []
    for answer in answers:
        known_choices = choices(scoring, answer)
        logprobs = tuple(next(likelihoods)[0] for _ in known_choices)
        likeliest = known_choices[max(range(len(logprobs)), key=logprobs.__getitem__)]
        weighed.append(replace(answer, logprobs=logprobs, text=answer.text or likeliest))
    return weighed


def choices(scoring: BoundScore, answer: Answer) -> tuple[str, ...]:
    """Return the texts whose likelihood a score asks for.

    Raises:
        DataError: the row has none.
    """
    return () if scoring.spec.choices is None else scoring.spec.choices(scoring.params, answer)


def _judged(scoring: BoundScore, answers: list[Answer], engine: Engine) -> ScoreResult:
    """Score on rank 0, for a judge may cost money and a function may count its calls; errors end all ranks alike."""
    PHASE.enter("eval", patient=True)
    result = on_rank_zero(engine, lambda: scoring.scorer(answers))
    PHASE.enter("eval")
    return result


def none_if_nan(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
