"""The rollouts folder of a run: what was asked, answered and rewarded in each step, to be read while it runs.

A JSON line per answer, prompt by prompt. Where several updates use the same answers, a step that is begun again reads
them from here, with the log-probabilities that its first update had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
                "ids": answer.ids,
                "logprobs": answer.logprobs,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.path(rollout.number), "".join(lines), durable=self.updates > 1)

    def read(self, number: int, names: Sequence[str]) -> tuple[list[Completion], list[Judged]]:
        """Return the answers of a rollout and what they were worth; `names` are its rows.

        Raises:
            CheckpointError: it cannot be read, or holds answers to other rows.
        """
        path = self.path(number)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: the answers that this step goes on with cannot be read: {error}") from error
        if [line["id"] for line in lines[:: self.answers_per_prompt]] != list(names):
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
        return answers, [Judged(parts=tuple(line["rewards"].values()), why=line["unscored"] or "") for line in lines]

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
