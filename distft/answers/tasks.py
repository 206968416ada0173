"""What lm-eval says of a task, in the form of a set of answers, to be kept and compared like one."""

from __future__ import annotations

import re

from distft.answers.exam import Exam, Taken
from distft.answers.words import Writing
from distft.data.questions import Question
from distft.scores import Answer, Scored


def kept(task: str, scored: Scored) -> tuple[Exam, Taken]:
    """Rows have numbers only: their text is the library's."""
    count = max((len(values) for values in scored.rows.values()), default=0)
    ids = [f"{task} row {number}" for number in range(1, count + 1)]
    asked = [Question(id=one, row={}, prompt="", ids=(), as_chat=False, reference="") for one in ids]
    name = f"lm-eval-{re.sub(r'[^A-Za-z0-9_-]+', '-', task)}"
    exam = Exam(name=name, questions=asked, scorings=(), writing=Writing())
    answers = [Answer(id=one, row={}, reference="") for one in ids]
    return exam, Taken(answers=answers, scored=[(task, scored)], seconds=0.0, answer_tokens=0, cut_prompts=0)
