"""Prompts whose answers are all worth the same are replaced: which, by what, how often, and after a stop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from one_rank import OneRank

from distft.core.errors import CheckpointError
from distft.data.questions import Question
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.objectives import OBJECTIVES
from distft.recipe.rollout import RolloutTable
from distft.step_sources import STEP_SOURCES, StepSourceInputs
from distft.step_sources.rollout_batches import RolloutBatches
from distft.step_sources.rollout_files import Rollout, RolloutFiles

ROWS, BATCH, ANSWERS = 24, 4, 3
REWARDS = ({"name": "exact_match"},)
HARD = 6
"""Rows below are answered wrongly by all answers; those above by some."""


class Steps:
    """Rows in their order, of one process."""

    global_batch_size, micro_batch_size, num_steps = BATCH, 2, ROWS // BATCH

    def sample_ids(self, step: int) -> tuple[str, ...]:
        return tuple(f"row {row}" for row in range(step * BATCH, (step + 1) * BATCH))

    def samples_in(self, step: int) -> int:
        return BATCH

    def slice_of_rank(self, step: int) -> tuple[int, int]:
        return 0, BATCH


class Writer:
    """Answers "yes" once for each prompt above HARD, in a place that follows from its row."""

    def __init__(self, hard: int = HARD) -> None:
        self.hard = hard
        self.asked: list[list[str]] = []
        self.stops = False

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        keys = [prompt.seed_key.split("\n") for prompt in prompts]
        self.asked.append([row for row, _, answer in keys if answer == "0"])
        if self.stops and len(self.asked) > 1:
            return None
        texts = [
            "yes" if (number := int(row.split()[1])) >= self.hard and int(answer) == number % ANSWERS else "no"
            for row, _, answer in keys
        ]
        return [Completion(text=text, ids=(5, 6), logprobs=(-1.0, -2.0), num_tokens=2, ended=True) for text in texts]


def opened(folder: Path, refill: int, writer: Writer, *, updates: int = 1, name: str = "grpo", seed: int = 3) -> Any:
    questions = [
        Question(id=f"row {row}", row={}, prompt="?", ids=(1, 2), as_chat=False, reference="yes") for row in range(ROWS)
    ]
    engine: Any = OneRank()
    engine.model = torch.nn.Linear(1, 1)
    table = RolloutTable(answers_per_prompt=ANSWERS, max_new_tokens=4, refill=refill, rewards=REWARDS, updates=updates)
    given: dict[str, Any] = {
        "steps": Steps(), "objective": OBJECTIVES[name].params(), "engine": engine, "policy": None,
        "fill": lambda micros: micros, "generator": lambda name: writer, "max_length": 64, "num_steps": 6 * updates,
        "rollout": table, "questions": lambda: questions, "folder": folder, "single_documents": False,
        "stop": lambda: False, "seed": seed,
    }  # fmt: skip
    source: Any = STEP_SOURCES["rollouts"].open(StepSourceInputs(**given))
    return source


def figures(micros: Sequence[Any]) -> dict[str, float]:
    names = ("equal_D", "refilled_D", "written_per_answer_D")
    return {name: float(torch.cat([micro.columns[name] for micro in micros]).mean()) for name in names}


def lines(folder: Path, step: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"step-{step:08d}.jsonl").read_text().splitlines()]


def test_equal_groups_are_replaced_in_rounds(tmp_path: Path) -> None:
    writer = Writer()
    micros = next(opened(tmp_path, 8, writer).from_step(0))
    first, *rounds = writer.asked
    assert first == ["row 0", "row 1", "row 2", "row 3"], "all too hard: every group is equal"
    assert all(len(asked) <= 4 for asked in rounds)
    flat = [row for asked in writer.asked for row in asked]
    assert len(flat) == len(set(flat)), "no prompt is asked twice"
    for before, after in itertools.pairwise(rounds):
        useful = sum(int(row.split()[1]) >= HARD for row in before)
        assert len(after) == len(before) - useful, "as many as are missing"
    assert len(micros) == 2, "micro-batches are as without"
    assert figures(micros) == {
        "equal_D": 0.0, "refilled_D": 1.0, "written_per_answer_D": pytest.approx(len(flat) / BATCH),
    }  # fmt: skip
    assert all(abs(float(micro.columns["advantage_D"].abs().min())) > 0 for micro in micros)
    written = lines(tmp_path)
    assert len(written) == BATCH * ANSWERS
    assert [line["replaces"] for line in written[::ANSWERS]] == first
    assert {line["id"] for line in written} <= set(flat[4:])
    assert written[0]["written"] == len(flat) * ANSWERS
    # The same seed and step: the same prompts, whoever asks; another seed others.
    for seed, same in ((3, True), (4, False)):
        again = Writer()
        next(opened(tmp_path / str(seed), 8, again, seed=seed).from_step(0))
        assert (again.asked == writer.asked) == same


def test_rounds_are_bounded_and_what_is_left_stays(tmp_path: Path) -> None:
    for refill in (0, 1):
        writer = Writer()
        source = opened(tmp_path / str(refill), refill, writer)
        micros = next(source.from_step(1))  # rows 4 to 7: two of them are too hard
        assert len(writer.asked) == 1 + refill
        kept = [line["id"] for line in lines(tmp_path / str(refill), 1)[::ANSWERS]]
        assert kept[2:] == ["row 6", "row 7"], "useful groups stay where they are"
        columns = micros[0].columns
        if refill:
            useful = [row for row in writer.asked[1] if int(row.split()[1]) >= HARD]
            assert kept[:2] == [*useful, *("row 4", "row 5")[len(useful) :]]
            assert figures(micros)["refilled_D"] == len(useful) / BATCH
            assert figures(micros)["written_per_answer_D"] == 1.5
        else:
            assert kept == ["row 4", "row 5", "row 6", "row 7"]
            assert "refilled_D" not in columns
            assert "written" not in lines(tmp_path / "0", 1)[0]
            assert columns["equal_D"].tolist() == [1.0] * 6
    writer = Writer()
    writer.stops = True
    assert list(opened(tmp_path / "stopped", 3, writer).from_step(0)) == [[]], "asked to stop in a round"
    # Nothing is left to ask: what there is stays, and is counted.
    writer = Writer(hard=ROWS)
    micros = next(opened(tmp_path / "all", 100, writer, name="rloo").from_step(0))
    assert len(writer.asked) == ROWS / BATCH
    assert figures(micros) == {"equal_D": 1.0, "refilled_D": 0.0, "written_per_answer_D": ROWS / BATCH}


def test_a_start_among_updates_reads_what_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_answer = {str(answer): [-1.0, -2.0] for answer in range(BATCH * ANSWERS)}
    measured = SimpleNamespace(logprobs=by_answer, reference={}, values={})
    # Measured log-probabilities are another matter (tests/dist/test_rollouts.py).
    monkeypatch.setattr(RolloutBatches, "_measure", lambda *_: measured)
    monkeypatch.setattr(RolloutFiles, "read_measured", lambda *_: measured)
    writer = Writer()
    before = next(opened(tmp_path, 8, writer, updates=2).from_step(0))
    asked = len(writer.asked)
    after = next(opened(tmp_path, 8, writer, updates=2).from_step(1))
    assert len(writer.asked) == asked, "nothing is written again"
    for one, other in zip(before, after, strict=True):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.input_ids_T, other.input_ids_T)
        for name in ("advantage_D", "refilled_D", "written_per_answer_D", "equal_D", "reward_total_D"):
            assert torch.equal(one.columns[name], other.columns[name]), name
    path = tmp_path / "step-00000000.jsonl"
    path.write_text(path.read_text().replace('"replaces": "row 2"', '"replaces": "row 9"'))
    with pytest.raises(CheckpointError, match="answers to other prompts than this step's"):
        next(opened(tmp_path, 8, writer, updates=2).from_step(1))


def test_rewards_below_zero_and_missing_ones(tmp_path: Path) -> None:
    """A group is equal when those that count are, whatever the others would be."""
    reward_PN = np.array([[-1.0, -1.0, np.nan], [-1.0, -2.0, np.nan], [np.nan] * 3, [0.0, 0.0, 0.0]])
    rollout = Rollout(
        number=0, questions=(), answers=(), judged=(), reward_PN=reward_PN, advantage_PN=reward_PN,
        counted_PN=~np.isnan(reward_PN),
    )  # fmt: skip
    assert rollout.equal_P.tolist() == [True, False, True, True]
    assert replace(rollout, counted_PN=reward_PN < -1.5).equal_P.tolist() == [True] * 4
