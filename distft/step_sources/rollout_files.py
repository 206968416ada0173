"""The rollouts folder of a run: what was asked, answered and rewarded in each step, to be read while it runs.

A JSON line per answer, prompt by prompt. Where several updates use the same answers, a step that is begun again reads
them from here, with the log-probabilities that its first update had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import CheckpointError
from distft.core.files import write_file
from distft.generation.completion import Completion
from distft.step_sources.rewards import Judged

if TYPE_CHECKING:
    import numpy as np

    from distft.data.questions import Question


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One step's answers: `answers`, `judged` and the rest are of all ranks, prompt by prompt."""

    number: int
    questions: Sequence[Question]
    answers: Sequence[Completion]
    judged: Sequence[Judged]
    reward_PN: np.ndarray
    """Weighted sums; NaN where there is no reward."""
    advantage_PN: np.ndarray
    """0 where an answer does not count."""
    counted_PN: np.ndarray
    """Whether an answer counts."""
    writing_s: float = 0.0
    """Seconds in which this rank wrote them; 0 where they have been read again."""
    judging_s: float = 0.0
    replaced: Mapping[int, str] = field(default_factory=dict[int, str])
    """Place of a prompt that stands for another one, whose answers were all worth the same -> that one's row."""
    written: int = 0
    """Answers that were written for it, those to replaced prompts with them."""

    @property
    def equal_P(self) -> np.ndarray:
        """Whether the answers of a prompt that count are all worth the same, or none counts."""
        import numpy as np

        most_P = np.where(self.counted_PN, self.reward_PN, -np.inf).max(1)
        return ~(most_P > np.where(self.counted_PN, self.reward_PN, np.inf).min(1))

    def refilled(self, places: Sequence[int], more: Rollout) -> Rollout:
        """Return the rollout with those prompts of `more` whose answers are worth more and less, at these places."""
        count = self.reward_PN.shape[1]
        questions, answers, judged = list(self.questions), list(self.answers), list(self.judged)
        reward_PN, counted_PN = self.reward_PN.copy(), self.counted_PN.copy()
        replaced = dict(self.replaced)
        useful = [place for place, is_equal in enumerate(more.equal_P.tolist()) if not is_equal]
        for place, source in zip(places, useful, strict=False):
            replaced[place] = questions[place].id
            questions[place] = more.questions[source]
            reward_PN[place], counted_PN[place] = more.reward_PN[source], more.counted_PN[source]
            mine, theirs = (slice(at * count, (at + 1) * count) for at in (place, source))
            answers[mine], judged[mine] = more.answers[theirs], more.judged[theirs]
        return replace(
            self,
            questions=questions,
            answers=answers,
            judged=judged,
            reward_PN=reward_PN,
            counted_PN=counted_PN,
            writing_s=self.writing_s + more.writing_s,
            judging_s=self.judging_s + more.judging_s,
            replaced=replaced,
            written=self.written + more.written,
        )


@dataclass(frozen=True, kw_only=True)
class StoredRollout:
    """What the file of a rollout says."""

    names: tuple[str, ...]
    """Rows that were asked, prompt by prompt."""
    answers: Sequence[Completion]
    judged: Sequence[Judged]
    replaced: Mapping[int, str]
    written: int


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Numbers of each token of the answers that count, by the number of each answer in the rollout."""

    logprobs: dict[str, list[float]]
    """Log-probabilities under the weights that the answers were written with."""
    reference: dict[str, list[float]]
    """Those of the model before training; empty where nothing reads them."""
    values: dict[str, list[float]]
    """A critic's values of the positions before the tokens; empty without one."""


@dataclass(frozen=True, kw_only=True)
class RolloutFiles:
    """Reads and writes the folder, on rank 0."""

    folder: Path
    rewards: tuple[str, ...]
    """Names of the rewards."""
    answers_per_prompt: int
    updates: int
    """Optimizer steps on each rollout: above 1 files are read again, so they must be on the disk."""

    def path(self, number: int) -> Path:
        """Return the file of a rollout, named after its first step."""
        return self.folder / f"step-{number * self.updates:08d}.jsonl"

    def write(self, rollout: Rollout) -> None:
        """Write a rollout's lines."""
        lines: list[str] = []
        for index, (answer, judged) in enumerate(zip(rollout.answers, rollout.judged, strict=True)):
            place = divmod(index, self.answers_per_prompt)
            question = rollout.questions[place[0]]
            reward = float(rollout.reward_PN[place])
            record: dict[str, Any] = {
                "id": question.id,
                "number": place[1],
                "prompt": question.prompt,
                "answer": answer.text,
                "ended": answer.ended,
                "reward": None if math.isnan(reward) else reward,
                "rewards": dict(zip(self.rewards, judged.parts, strict=False)),
                "advantage": float(rollout.advantage_PN[place]),
                "unscored": judged.why or None,
                **({"policy": answer.policy} if answer.policy else {}),
                **({"replaces": rollout.replaced[place[0]]} if place[0] in rollout.replaced else {}),
                **({"written": rollout.written} if index == 0 and rollout.written > len(rollout.answers) else {}),
                "ids": answer.ids,
                "logprobs": answer.logprobs,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.path(rollout.number), "".join(lines), durable=self.updates > 1)

    def read(self, number: int, names: Sequence[str]) -> StoredRollout:
        """Return the answers of a rollout and what they were worth; `names` are its step's rows.

        Raises:
            CheckpointError: it cannot be read, or holds answers to other rows.
        """
        path = self.path(number)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: the answers that this step goes on with cannot be read: {error}") from error
        firsts = lines[:: self.answers_per_prompt]
        if [line.get("replaces", line["id"]) for line in firsts] != list(names):
            raise CheckpointError(f"{path}: holds answers to other prompts than this step's")
        answers = [
            Completion(
                text=line["answer"],
                ids=tuple(line["ids"]),
                logprobs=tuple(line["logprobs"]),
                num_tokens=len(line["ids"]),
                ended=line["ended"],
                policy=line.get("policy", ""),
            )
            for line in lines
        ]
        return StoredRollout(
            names=tuple(line["id"] for line in firsts),
            answers=answers,
            judged=[Judged(parts=tuple(line["rewards"].values()), why=line["unscored"] or "") for line in lines],
            replaced={place: line["replaces"] for place, line in enumerate(firsts) if "replaces" in line},
            written=firsts[0].get("written", len(lines)),
        )

    def write_measured(self, number: int, measured: TokenFigures) -> None:
        """Keep what a rollout's first update began with."""
        write_file(self._measured(number), json.dumps(asdict(measured)), durable=True)

    def read_measured(self, number: int) -> TokenFigures:
        """Return what `write_measured` has kept.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self._measured(number)
        try:
            return TokenFigures(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: what this step goes on with cannot be read: {error}") from error

    def _measured(self, number: int) -> Path:
        return self.path(number).with_suffix(".logprobs.json")
