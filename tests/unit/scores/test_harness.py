"""lm-eval's own tasks on a model of ours: requests arrive whole, figures come back as the library counts them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distft.core.errors import MachineError, RecipeError
from distft.scores import ScoreResult
from distft.scores.harness import LmEvalTasks
from distft.scores.paired import compare

EVALUATOR = "lm_eval.evaluator"


class Knows:
    """Adds correctly below a limit; finds the shortest choice likeliest, letter by letter."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[dict[str, Any]] = []

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(-float(len(continuation)), False) for _, continuation in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        return [-2.0 * len(text) for text in texts]

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self.asked.append({"prompts": list(prompts), **settings})
        sums = [sum(map(int, prompt.rpartition("Q: ")[2].split("=")[0].split("+"))) for prompt in prompts]
        return [f"I think {one}\n#### {one if one < self.limit else one + 1}" for one in sums]


def run(model: Knows, task: Any, **settings: Any) -> ScoreResult:
    return LmEvalTasks(task, **settings).run(model)[1]


@pytest.fixture
def task(tmp_path: Path):
    pytest.importorskip(EVALUATOR, reason="lm-eval is not installed")

    def config(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "num_fewshot": 0,
            **more,
        }

    return config


def sums(task) -> dict[str, Any]:
    return task(
        "sums",
        [{"q": f"{at} + {at}", "a": str(2 * at)} for at in range(10)],
        output_type="generate_until",
        doc_to_text="Q: {{q}} =",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n\n", "Q:"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 32},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {"name": name, "filter": [{"function": "regex", "regex_pattern": found}, {"function": "take_first"}]}
            for name, found in (("strict", "#### (\\d+)"), ("first", "(\\d+)"))
        ],
    )


@pytest.mark.slow
def test_generation_with_filters(task) -> None:
    model = Knows(10)
    scored = run(model, sums(task))
    assert scored.rows == {"exact_match,strict": (1.0,) * 5 + (0.0,) * 5, "exact_match,first": (1.0,) * 10}
    assert scored.totals == {"exact_match,strict": 0.5, "exact_match,first": 1.0}
    assert all(figure.binary and figure.higher_is_better for figure in scored.figures)
    (asked,) = model.asked
    assert asked["prompts"][3] == "Q: 3 + 3 ="
    assert (asked["stop"], asked["max_new_tokens"], asked["temperature"]) == (("\n\n", "Q:"), 32, 0.0)


@pytest.mark.slow
def test_two_models_are_compared_like_any_two_scores(task) -> None:
    before, after = (run(Knows(limit), sums(task)) for limit in (2, 20))
    change = compare(before, after)[0]
    assert (change.before.value, change.after.value, change.verdict) == (0.1, 1.0, "better")
    assert change.mcnemar is not None
    assert (change.mcnemar.gained, change.mcnemar.lost) == (9, 0)


@pytest.mark.slow  # lm-eval takes 20 s of CPU to begin; test_lm_eval_set has its choices
def test_multiple_choice_and_perplexity(task) -> None:
    choose = task(
        "choose",
        [{"q": "x", "choices": ["yes", "certainly"], "label": at % 2} for at in range(6)],
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="choices",
        doc_to_target="label",
    )
    text = task(
        "text",
        [{"text": "one two"}, {"text": "three"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    )
    found = {one["task"]: run(Knows(0), one, limit=4) for one in (choose, text)}
    assert found["choose"].totals["acc"] == 0.5
    assert found["choose"].rows["acc"] == (1.0, 0.0, 1.0, 0.0)
    (figure,) = found["text"].figures
    assert (figure.name, figure.higher_is_better, figure.per_row) == ("byte_perplexity", False, False)
    assert found["text"].totals["byte_perplexity"] == pytest.approx(7.389056)  # e ** 2 a byte


@pytest.mark.slow  # lm-eval reads thousands of files
def test_an_unknown_task_is_named() -> None:
    pytest.importorskip(EVALUATOR, reason="lm-eval is not installed")
    with pytest.raises(RecipeError, match='task "gsm8"  is not one of lm-eval\'s  did you mean "gsm'):
        LmEvalTasks("gsm8")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MachineError, match=r"distft\[lm-eval\]"):
        LmEvalTasks("gsm8k")


@pytest.mark.slow
def test_a_groups_rows_are_taken_together(task, tmp_path: Path) -> None:
    """`acc` counts every row alike, `acc_norm` every task: there the library's total has no interval over rows."""
    for name, rows in (("one", 6), ("two", 2)):
        own = task(
            name,
            [{"q": "x", "choices": ["yes", "certainly"], "label": at % (3 if name == "one" else 1)} for at in range(2)]
            * (rows // 2),
            output_type="multiple_choice",
            doc_to_text="{{q}}",
            doc_to_choice="choices",
            doc_to_target="label",
        )
        (tmp_path / f"{name}.yaml").write_text(json.dumps(own))
    means = [{"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm", "weight_by_size": False}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": means}
    (tmp_path / "both.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in group.items()))
    tasks = LmEvalTasks(str(tmp_path / "both.yaml"))
    assert (tasks.rows, [figure.name for figure in tasks.planned]) == (8, ["acc", "acc_norm"])
    answers, scored = tasks.run(Knows(0))
    assert [one.id for one in answers][5:7] == ["one row 6", "two row 1"]
    assert scored.rows["acc"] == (1, 0, 1, 0, 1, 0, 1, 1)
    assert scored.totals == {"acc": 0.625, "acc_norm": 0.25}
    assert {figure.name: figure.per_row for figure in scored.figures} == {"acc": True, "acc_norm": False}
    assert (answers[1].reference, answers[1].text, answers[1].row["task"]) == ("certainly", "yes", "one")
