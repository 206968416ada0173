"""Single answers with a label in every form that people have; prompts paired with another row's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.core.errors import DataError
from distft.data.formats import unpaired
from distft.data.loader import EvalSteps, Steps
from distft.data.mismatched import MismatchedRows
from distft.data.prepare import prepare
from distft.data.samples import Conversation, PromptCompletion, RowError
from distft.recipe.schema import DataTable, TrainSourceTable

USER, GOOD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "TRL, texts": (
        {"prompt": "2+2=", "completion": "4", "label": True},
        PromptCompletion(prompt="2+2=", completion="4"),
    ),
    "TRL, messages": ({"prompt": [USER], "completion": [GOOD], "label": True}, 1),
    "a chat": ({"messages": [USER, GOOD, USER, GOOD], "label": 1}, 3),
    "LLaMA-Factory, alpaca": ({"instruction": "2+2?", "input": "", "output": "4", "kto_tag": True}, 1),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "kto_tag": True},
        1,
    ),
}
MISTAKES = {
    "no label": ({"prompt": "a", "completion": "b"}, 'missing "label"'),
    "a label as text": (
        {"prompt": "a", "completion": "b", "label": "true"},
        '"label" is a string "true", expected true',
    ),
    "a rating": ({"prompt": "a", "completion": "b", "label": 4}, '"label" is a number 4, expected true'),
    "null": ({"prompt": "a", "completion": "b", "label": None}, '"label" is null, expected true'),
    "two labels": ({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}, 'both "label" and "kto_tag"'),
    "no answer": ({"prompt": "a", "label": True}, "a label and no answer"),
    "a question last": ({"messages": [USER, GOOD, USER], "label": True}, "the last message is from user"),
    "half a chat": ({"prompt": "a", "completion": [GOOD], "label": True}, "both must be strings, or both lists"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_one_document_with_its_label(form: str) -> None:
    row, expected = FORMS[form]
    assert unpaired.matches(row)
    for label in row.keys() & set(unpaired.LABELS):
        for value, number in ((True, 1.0), (False, 0.0)):
            group = unpaired.convert(row | {label: value})
            assert group.values == (number,)
            [document] = group.documents
            if isinstance(document, Conversation):
                assert document.num_prompt == expected == len(document.messages) - 1, "the last answer alone is judged"
            else:
                assert document == expected


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_plain_words(mistake: str) -> None:
    row, message = MISTAKES[mistake]
    with pytest.raises(RowError, match=message.replace("(", r"\(")):
        unpaired.convert(row)


@pytest.fixture
def table(tmp_path: Path) -> DataTable:
    rows = [
        {"prompt": "a b c " * (1 + index % 3), "completion": f"x y {index} " * (1 + index % 4), "label": index % 3 == 0}
        for index in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataTable(train=(TrainSourceTable(path=str(path)),), max_length=48)  # pyright: ignore[reportArgumentType]


def test_prompts_get_the_answer_of_the_row_before_in_the_batch(
    table: DataTable, tokenizer: Path, tmp_path: Path
) -> None:
    rows = prepare(table, table.train, split="train", tokenizer=str(tokenizer), cache_dir=tmp_path / "c")
    assert rows.report.sources[0].format == "unpaired"
    given = {"seed": 1, "epochs": 2, "max_steps": None, "global_batch_size": 4, "micro_batch_size": 1}
    steps = Steps(rows, table, **given)
    batches = [steps.rows_in(step) for step in range(steps.num_steps)]
    made = MismatchedRows(rows, batches, max_length=table.max_length)
    met = set()
    for batch in batches:
        for row, before, index in zip(batch, np.roll(batch, 1), made.of_batch(batch), strict=True):
            (ids, trained), (mine, judged), (theirs, answer) = made.row(index), rows.row(row), rows.row(before)
            begin, other = int(judged.argmax()), int(answer.argmax())
            assert ids.tolist() == [*mine[:begin], *theirs[other:]][: table.max_length]
            assert trained.tolist() == [*judged[:begin], *answer[other:]][: table.max_length]
            assert made.lengths[index] == len(ids) <= table.max_length
            assert made.supervised[index] == trained[1:].sum()
            met.add((row, before))
    assert made.num_rows == len(met) > rows.num_rows, "another order in the second epoch, and no pair twice"
    assert made.fingerprint != MismatchedRows(rows, batches[:3], max_length=table.max_length).fingerprint
    chosen = made.of_batch(batches[0])
    seen = [row for batch in EvalSteps(made, table, micro_batch_size=2, only=chosen) for row in batch.rows]
    assert sorted(seen) == sorted(chosen.tolist())


def test_judged_rows_do_not_train_their_prompts(table: DataTable, tokenizer: Path, tmp_path: Path) -> None:
    wrong = table.model_copy(update={"loss_on": "all"})
    with pytest.raises(DataError, match=r'loss_on = "all" would train the prompts too'):
        prepare(wrong, wrong.train, split="train", tokenizer=str(tokenizer), cache_dir=tmp_path / "c")
