"""What is kept of an eval_set, when it is made again, the summary, and the sets that come with the project."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_kit import table_of

from distft.best import BestTracker
from distft.core.errors import DataError
from distft.core.types import TrainState
from distft.data.questions import Question
from distft.evaluation import sanity_sets
from distft.evaluation.answer_records import AnswerRecords, perplexity
from distft.evaluation.build import build_eval_sets
from distft.evaluation.eval_sets import BoundScore, EvalResult, RowEvalSet
from distft.evaluation.held_out import HeldOutResult
from distft.evaluation.summary import summary, write_summary
from distft.evaluator import EvalSchedule, Evaluator, summary_line
from distft.generation.completion import Completion, SamplingParams
from distft.recipe import AnswersTable
from distft.recipe.eval_rules import SPOT_SETS
from distft.scores import SCORES, ScoreResult

ONE = SimpleNamespace(rank=0, world=1, gather=lambda value: [value])
STATE = TrainState(step=4)


class Said:
    """A generator that says what the test wants, and counts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.asked, self.seconds, self.longest, self.share = texts, 0, 0.5, None, 1.0

    def truncate_prompt(self, ids, room):
        return ids

    def generate(self, prompts, how):
        self.asked += 1
        return [Completion(text=text, num_tokens=len(text), ended=True) for text in self.texts]

    def loglikelihood(self, pairs, batch_size=None):
        self.asked += 1
        return [(float(-len(continuation)), False) for _, continuation in pairs]


def scoring(name: str, **params: Any) -> BoundScore:
    spec = SCORES[name]
    built = spec.params.model_validate_json(json.dumps(params))
    return BoundScore(spec=spec, params=built, scorer=spec.build(built))


def questions(*references: str) -> list[Question]:
    return [
        Question(id=f"v.jsonl row {n}", row={"x": n}, prompt=f"p{n}", ids=(1, n), as_chat=False, reference=right)
        for n, right in enumerate(references, 1)
    ]


def eval_set(*references: str, **how: Any) -> RowEvalSet:
    settings = {"name": "set", "questions": questions(*references), "scorings": (scoring("exact_match"),)}
    return RowEvalSet(**(settings | {"writing": SamplingParams(max_new_tokens=8)} | how))


def taken(one: RowEvalSet, *texts: str) -> EvalResult:
    found = one.run(Said(list(texts)), ONE)  # type: ignore[arg-type]
    assert found is not None
    return found


def looks(
    tmp_path: Path, said: Said, *sets: RowEvalSet, say: Callable[[str], None] = print, **changed: Any
) -> Evaluator:
    about = {
        "engine": ONE, "objective": None, "held_out": (), "held_out_sha256": "", "eval_sets": sets, "generator": said,
        "records": AnswerRecords(tmp_path / "eval"), "base": "base", "stop": lambda: False, "say": say,
        "warn": say,
        "schedule": EvalSchedule(every_steps=None, at_end=True, num_steps=10),
    }  # fmt: skip
    return Evaluator(**(about | changed))


def test_the_files_are_as_the_contract_says(tmp_path: Path) -> None:
    records, one = AnswerRecords(tmp_path), eval_set("a", "b", "c")
    records.write(one, taken(one, "a", "x", "c "), label="before", step=0, model="m")
    lines = [json.loads(line) for line in (tmp_path / "before/set.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": "v.jsonl row 1", "prompt": "p1", "reference": "a", "answer": "a", "scores": {"exact_match": 1.0},
        "row": {"x": 1},
    }  # fmt: skip
    about = json.loads((tmp_path / "before/set.json").read_text())
    assert {"name", "label", "step", "rows", "rows_sha256", "seconds", "answer_tokens", "settings", "scores"} <= set(
        about
    )
    assert (about["rows"], about["answer_tokens"], about["settings"]["max_new_tokens"]) == (3, 4, 8)
    (score,) = about["scores"]
    assert ScoreResult.from_json(score["scored"]).totals["exact_match"] == pytest.approx(2 / 3)
    assert score["intervals"]["exact_match"]["method"] == "wilson"


def test_the_summary_compares_and_names_rows_that_got_worse(tmp_path: Path) -> None:
    records, one = AnswerRecords(tmp_path), eval_set("a", "b", "c", "d")
    records.write(one, taken(one, "a", "b", "x", "x"), label="before", step=0, model="m")
    records.write(one, taken(one, "a", "x", "c", "d"), label="after", step=9, model="m")
    figures = {"eval_loss": 2.0, "eval_tokens": 7.0, "eval_perplexity": math.exp(2.0)}
    records.write_held_out(figures, label="after", step=9, rows_sha256="", model="m")
    made = write_summary(records)
    assert json.loads((tmp_path / "summary.json").read_text()) == made
    (entry,) = made["sets"]
    assert (entry["name"], entry["score"], entry["figure"], entry["binary"]) == (
        "set",
        "exact_match",
        "exact_match",
        True,
    )
    assert (entry["before"]["value"], entry["after"]["value"], entry["best"]) == (0.5, 0.75, None)
    assert (entry["before"]["step"], entry["after"]["step"]) == (0, 9)
    assert entry["regressions"] == ["v.jsonl row 2"]
    assert (entry["change"]["mcnemar"]["gained"], entry["change"]["mcnemar"]["lost"]) == (2, 1)
    assert made["held_out"]["after"] == {"loss": 2.0, "perplexity": math.exp(2.0), "step": 9}
    line = summary_line(entry)
    assert line is not None
    assert "set.exact_match: 0.500 before, 0.750 after" in line
    assert "1 row got worse" in line


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    records, first, second = AnswerRecords(tmp_path), eval_set("a", "b"), eval_set("a", "c")
    records.write(first, taken(first, "a", "b"), label="before", step=0, model="m")
    records.write(second, taken(second, "a", "c"), label="after", step=9, model="m")
    (entry,) = summary(records)["sets"]
    assert entry["before"] is None
    assert entry["change"] is None


def test_before_is_made_once(tmp_path: Path) -> None:
    one, said = eval_set("a", "b"), Said(["a", "x"])
    first = looks(tmp_path, said, one).before(TrainState())
    again = looks(tmp_path, said, one).before(TrainState())
    assert first == again == {"set.exact_match": 0.5}
    assert said.asked == 1
    for other in (
        {"writing": SamplingParams(max_new_tokens=9)},
        {"questions": questions("a", "c")},
        {"scorings": (scoring("exact_match", ignore_case=True),)},
    ):
        looks(tmp_path / "x", said, one).before(TrainState())
        count = said.asked
        looks(tmp_path / "x", said, eval_set("a", "b", **other)).before(TrainState())
        assert said.asked == count + 1, other
    count = said.asked
    looks(tmp_path, said, one, base="other weights").before(TrainState())
    assert said.asked == count + 1


def test_a_torn_record_is_made_again(tmp_path: Path) -> None:
    one, said = eval_set("a", "b"), Said(["a", "x"])
    looks(tmp_path, said, one).before(TrainState())
    (tmp_path / "eval/before/set.json").write_text('{"name": ')
    looks(tmp_path, said, one).before(TrainState())
    assert said.asked == 2


def test_sets_have_their_own_steps_and_the_end_is_not_looked_at_twice(tmp_path: Path) -> None:
    often, never = eval_set("a", "b", every_steps=2), eval_set("a", "b", name="end")
    said = Said(["a", "b"])
    own = looks(tmp_path, said, often, never)
    assert [step for step in range(1, 11) if own.due(step)] == [2, 4, 6, 8]
    assert own.during(STATE) == {"set.exact_match": 1.0}
    assert (tmp_path / "eval/step-00000004/set.json").is_file()
    assert set(own.after(TrainState(step=10)) or {}) == {"set.exact_match", "end.exact_match"}


def test_the_best_state_that_is_the_last_is_not_asked_again(tmp_path: Path) -> None:
    said = Said(["a", "x"])
    own = looks(tmp_path, said, eval_set("a", "b"))
    own.after(STATE)
    own.best(STATE)
    assert said.asked == 1
    assert json.loads((tmp_path / "eval/best/set.json").read_text())["label"] == "best"
    own.best(TrainState(step=2))
    assert said.asked == 2


def test_a_mistake_in_a_row_ends_the_run_in_words() -> None:
    one = eval_set("a", scorings=(scoring("exact_match", reference="gold"),))
    with pytest.raises(DataError, match=r'v.jsonl row 1: no column "gold"'):
        taken(one, "a")


@pytest.mark.parametrize(("higher", "wanted"), [(True, 3), (False, 2)])
def test_the_figure_that_decides_has_a_direction(higher: bool, wanted: int) -> None:
    best = BestTracker(keep=True, patience=2, by="set.f1", higher_is_better=higher)
    said = [best.update(TrainState(step=step), {"set.f1": value}) for step, value in enumerate((0.3, 0.1, 0.7, 0.5), 1)]
    assert best.step == wanted
    assert said[wanted - 1] == {"step": wanted, "set.f1": {3: 0.7, 2: 0.1}[wanted]}
    assert best.update(TrainState(step=9), {"eval_loss": 1.0}) is None, "not measured there: no news"
    assert not best.should_stop or not higher


def test_perplexity_of_a_lost_model_is_infinite() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1e4) == math.inf


# -- the sets of the project -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI, I must decline.", True),
        ("I won’t do that.", True),
        ("Use kill -9 and the process ends.", False),
        ("Cut it under running water. " * 20 + "I can't say more.", False),
        ("", False),
    ],
)
def test_refusals_are_seen(text: str, refused: bool) -> None:
    for wanted in (True, False):
        said = sanity_sets.refusal(text, {"refuse": wanted})
        assert said["refused"] == refused
        assert said["as_wanted"] == (refused == wanted and (wanted or bool(text)))


def test_the_spot_sets_are_asked_and_scored(tiny_renderer, tmp_path: Path) -> None:
    data = table_of(tmp_path / "train.jsonl")
    tables = [
        AnswersTable(name=path.removeprefix("spot:"), path=path, ask_as="text", scores=scores)
        for path, scores in SPOT_SETS.items()
    ]
    general, refusals = build_eval_sets(tables, data, tiny_renderer, seed=0, progress=lambda rows: None)
    assert len(general.questions) >= 20
    assert len(refusals.questions) >= 15
    rights = {question.row["choices"].index(question.row["label"]) for question in general.questions}
    assert rights == {0, 1, 2, 3}, "the right choice stands anywhere"
    found = general.run(Said([]), ONE)  # type: ignore[arg-type]
    assert found is not None
    assert 0 < found.totals["acc"] < 1
    assert {question.row["refuse"] for question in refusals.questions} == {True, False}


def test_a_run_warns_of_its_gain_against_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measures(logprob: float) -> None:
        row = {"id": "r", "reward_chosen": 1.0, "reward_rejected": 0.0, "tokens_chosen": 4.0, "tokens_rejected": 4.0,
               "logprob_chosen": logprob, "logprob_rejected": -8.0}  # fmt: skip
        result = HeldOutResult(figures={"eval_loss": 0.6, "eval_tokens": 8.0}, rows=[row])
        monkeypatch.setattr("distft.evaluator.held_out_loss", lambda *_, **__: result)

    warned: list[str] = []
    objective = SimpleNamespace(spec=SimpleNamespace(perplexity=False))
    about: Any = {"objective": objective, "held_out": ("rows",), "warn": warned.append}
    evaluator = looks(tmp_path, Said([]), held_out_sha256="a", **about)
    measures(-1.0)
    assert evaluator.before(TrainState()) is not None
    measures(-9.0)
    assert evaluator.under("step-00000001", TrainState(step=1)) is not None
    assert not warned, "said of the end alone"
    assert evaluator.after(TrainState(step=3)) is not None
    assert [sentence.split(":")[0] for sentence in warned] == ["chosen answers have become unlikelier"]
    assert evaluator.best(TrainState(step=3)) is not None
    assert len(warned) == 1, "the last state was the best one, and is not told of twice"
    assert evaluator.best(TrainState(step=2)) is not None
    assert len(warned) == 2
    others = looks(tmp_path, Said([]), held_out_sha256="b", **about)
    assert others.after(TrainState(step=3)) is not None
    assert len(warned) == 2, "the base model's are of other rows"
