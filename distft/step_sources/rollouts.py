"""Steps of the model's own answers: written with the weights as they are, judged, and weighed against each other.

Answers depend on weights, prompt, the run's seed, the rollout's number and their own, not on batch, rank, engine or
world size. So a run that goes on from a checkpoint writes the same answers again; where several updates use them, it
reads them from the rollouts folder.

Shape letters: P prompts of a step on all ranks, N answers to each.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distft.core.errors import DataError, Problem, RecipeError
from distft.core.phase import PHASE
from distft.core.ranks import on_rank_zero
from distft.generation.completion import Completion, Prompt, SamplingParams, seed_digest
from distft.scores import Answer
from distft.step_sources.rewards import Judged, RewardProcess, rewards_of
from distft.step_sources.rollout_batches import RolloutBatches
from distft.step_sources.rollout_files import Rollout, RolloutFiles
from distft.step_sources.spec import StepSourceInputs, StepSourceSpec

if TYPE_CHECKING:
    from distft.core.protocols import StepSource
    from distft.core.types import Batch
    from distft.data.questions import Question


class RolloutSteps:
    """A `StepSource` that answers the prompts of the recipe's rows."""

    def __init__(self, inputs: StepSourceInputs) -> None:
        self._inputs, self._table = inputs, inputs.rollout
        self._rewards = rewards_of(self._table)
        chosen: Any = self._table.generator
        self._generator = inputs.generator(chosen["name"])
        self._files = RolloutFiles(
            folder=inputs.folder,
            rewards=tuple(reward.name for reward in self._rewards),
            answers_per_prompt=self._table.answers_per_prompt,
            updates=self._table.updates,
        )
        self._judge = RewardProcess(
            self._rewards, timeout_s=self._table.reward_timeout_s, memory_gib=self._table.reward_memory_gib
        )
        self._questions = {question.id: question for question in inputs.questions()}
        self._batches = RolloutBatches(inputs, self._files, tuple(reward.name for reward in self._rewards))
        self._current: tuple[int, list[Batch]] | None = None
        self._refuse_dropout()
        self._refuse_long_prompts()

    # -- what the loop asks --------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self._inputs.num_steps

    def epoch_at(self, samples: int) -> float:
        """Return the passes over the prompts that are done."""
        return self._inputs.steps.epoch_at(samples)

    def samples_in(self, step: int) -> int:
        """Return the prompts of a step on all ranks; they count in the first update by their answers."""
        number, update = divmod(step, self._table.updates)
        return 0 if update else self._inputs.steps.samples_in(number)

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step; an empty list when some rank was asked to stop."""
        for index in range(step, self.num_steps):
            number, update = divmod(index, self._table.updates)
            if self._current is None or self._current[0] != number:
                rollout = self._write(number) if update == 0 else self._read(number)
                if rollout is None:
                    yield []
                    return
                self._current = (number, self._batches.of(rollout, is_new=update == 0))
            yield self._current[1]

    # -- answers -------------------------------------------------------------------------------------------------------

    def _asked(self, names: Iterable[str]) -> list[Question]:
        return [self._questions[name] for name in names]

    def _write(self, number: int) -> Rollout | None:
        """Collective: write and judge the answers of a step; None when some rank was asked to stop."""
        names = self._inputs.steps.sample_ids(number)
        rollout = self._answered(number, self._asked(names))
        others = self._elsewhere(number, set(names))
        for _ in range(self._table.refill):
            if rollout is None:
                return None
            places = [place for place, is_equal in enumerate(rollout.equal_P.tolist()) if is_equal]
            questions = list(itertools.islice(others, len(places)))
            if not questions:
                break
            more = self._answered(number, questions)
            rollout = None if more is None else rollout.refilled(places, more)
        if rollout is None:
            return None
        rollout = self._weighed(rollout)
        if self._inputs.engine.rank == 0:
            self._files.write(rollout)
        return rollout

    def _elsewhere(self, number: int, seen: set[str]) -> Iterator[Question]:
        """Yield prompts of the run's other steps, each once, in an order that follows from seed and number alone."""
        import numpy as np

        steps = self._inputs.steps
        key = seed_digest(self._inputs.seed, f"refill\n{number}")[:16]
        drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
        for step in drawn.permutation(steps.num_steps).tolist():
            for name in steps.sample_ids(step):
                if name not in seen:
                    seen.add(name)
                    yield self._questions[name]

    def _answered(self, number: int, questions: Sequence[Question]) -> Rollout | None:
        """Collective: return answers to these prompts with what they are worth; None when asked to stop."""
        table = self._table
        prompts = [
            Prompt(seed_key=f"{question.id}\n{number}\n{answer}", ids=question.ids)
            for question in questions
            for answer in range(table.answers_per_prompt)
        ]
        how = SamplingParams(
            max_new_tokens=table.max_new_tokens,
            temperature=table.temperature,
            top_p=table.top_p,
            stop=table.stop,
            seed=self._inputs.seed,
            batch_size=table.batch_size,
            logprobs=True,
        )
        began = time.perf_counter()
        answers = self._generator.generate(prompts, how)
        if answers is None:
            return None
        written = time.perf_counter()
        PHASE.enter("rewards", patient=True)
        judged = on_rank_zero(self._inputs.engine, lambda: self._judged(questions, answers))
        if judged is None:
            return None
        PHASE.enter("data")
        rollout = self._rewarded(number, questions, answers, judged)
        return replace(rollout, writing_s=written - began, judging_s=time.perf_counter() - written)

    def _judged(self, questions: Sequence[Question], answers: Sequence[Completion]) -> list[Judged] | None:
        """Return what each answer is worth; None when this rank was asked to stop.

        Raises:
            DataError: too many of them could not be judged.
        """
        count = self._table.answers_per_prompt
        if not self._rewards:
            return [Judged() for _ in answers]
        judged = self._judge.judge(
            [
                Answer(
                    id=f"{question.id}, answer {index % count + 1}",
                    row=question.row,
                    reference=question.reference,
                    text=answer.text,
                    prompt=question.prompt,
                    messages=None if question.chat is None else tuple(question.chat.messages),
                    tools=None if question.chat is None else question.chat.tools,
                )
                for index, answer in enumerate(answers)
                for question in [questions[index // count]]
            ],
            most_unscored=math.floor(self._table.max_unscored * len(answers)),
            stop=self._inputs.stop,
        )
        if judged is None:
            return None
        reasons = [one.why for one in judged if one.why]
        if len(reasons) > self._table.max_unscored * len(answers):
            shown = "; ".join(list(dict.fromkeys(reasons))[:3])
            raise DataError(
                f"{len(reasons):,} of the first {len(judged):,} answers have no reward: {shown}  "
                f"mend what is rewarded, or raise [rollout] max_unscored = {self._table.max_unscored:g}"
            )
        return judged

    def _rewarded(
        self, number: int, questions: Sequence[Question], answers: Sequence[Completion], judged: Sequence[Judged]
    ) -> Rollout:
        """Return the answers with their rewards, and which of them count; advantages come when all are there."""
        import numpy as np

        shape = (len(questions), self._table.answers_per_prompt)
        weights = [reward.weight for reward in self._rewards]
        reward_PN = np.array(
            [
                math.nan if one.why else math.fsum(w * value for w, value in zip(weights, one.parts, strict=True))
                for one in judged
            ]
        ).reshape(shape)
        if self._table.mask_truncated:
            reward_PN = np.where(np.array([one.ended for one in answers]).reshape(shape), reward_PN, math.nan)
        counted_PN = ~np.isnan(reward_PN)
        if self._inputs.objective.compares_answers:  # an answer alone has nothing to be compared with
            counted_PN &= counted_PN.sum(1, keepdims=True) > 1
        return Rollout(
            number=number,
            questions=questions,
            answers=answers,
            judged=judged,
            reward_PN=np.where(counted_PN, reward_PN, math.nan),
            advantage_PN=np.zeros(shape),
            counted_PN=counted_PN,
            written=len(answers),
        )

    def _weighed(self, rollout: Rollout) -> Rollout:
        """Return the rollout with its advantages.

        Raises:
            DataError: no answer counts.
        """
        import numpy as np

        if not rollout.counted_PN.any():
            needed = "two answers that count" if self._inputs.objective.compares_answers else "an answer that counts"
            raise DataError(
                f"step {rollout.number * self._table.updates + 1}: no prompt has {needed}"
                + ("  raise [rollout] max_new_tokens, or mask_truncated = false" if self._table.mask_truncated else "")
            )
        advantage_PN = np.where(rollout.counted_PN, self._inputs.objective.advantages(rollout.reward_PN), 0.0)
        return replace(rollout, advantage_PN=advantage_PN)

    def _read(self, number: int) -> Rollout:
        """Collective: return the answers of a step that was begun before this start.

        Raises:
            CheckpointError: they are not there, or not those of this run.
        """
        names = self._inputs.steps.sample_ids(number)
        stored = on_rank_zero(self._inputs.engine, lambda: self._files.read(number, names))
        rollout = self._rewarded(number, self._asked(stored.names), stored.answers, stored.judged)
        return self._weighed(replace(rollout, replaced=stored.replaced, written=stored.written))

    # -- mistakes ------------------------------------------------------------------------------------------------------

    def _refuse_dropout(self) -> None:
        """Check that the model computes in training as it does while it writes.

        Raises:
            RecipeError: it drops something out.
        """
        from torch import nn

        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in self._inputs.engine.model.modules()):
            message = "dropout changes the probabilities of answers that were written without it"
            raise RecipeError("recipe", [Problem(message=message, fix="[method] dropout = 0.0")])

    def _refuse_long_prompts(self) -> None:
        """Check that a group fits in a sequence, for every prompt.

        Raises:
            DataError: some do not.
        """
        table, most = self._table, self._inputs.max_length
        room = most // table.answers_per_prompt - table.max_new_tokens
        long = [question for question in self._questions.values() if len(question.ids) > room]
        if long:
            longest = max(len(question.ids) for question in long)
            needed = table.answers_per_prompt * (longest + table.max_new_tokens)
            raise DataError(
                f"{long[0].id} and {len(long) - 1:,} more: {table.answers_per_prompt} answers of "
                f"{table.max_new_tokens} tokens, each behind its prompt, do not fit in [data] max_length = {most:,}  "
                f"the longest prompt has {longest:,} tokens: max_length = {needed:,} holds all; or lower "
                "max_new_tokens or answers_per_prompt"
            )


def _open(inputs: StepSourceInputs) -> StepSource:
    return RolloutSteps(inputs)


SPEC = StepSourceSpec(name="rollouts", open=_open, updates=lambda rollout: rollout.updates)
