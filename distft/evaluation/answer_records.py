"""Keeps the answers of an evaluation set in `eval/LABEL/NAME.jsonl` and `NAME.json`, the loss in `held_out.json`.

Labels: `before`, `after`, `best`, `step-%08d`, or what `distft eval --label` says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distft.core.errors import FileSystemError
from distft.core.files import replace_file
from distft.evaluation.eval_sets import EvalResult, EvalSet, none_if_nan
from distft.evaluation.judged import judged_figures
from distft.scores import ScoreResult
from distft.scores.paired import interval

HELD_OUT = "held_out"


def step_label(step: int) -> str:
    """Return the label of answers during training."""
    return f"step-{step:08d}"


class AnswerRecords:
    """The folder `RUN/eval`. Rank 0 writes; reading is for everyone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, eval_set: EvalSet, result: EvalResult, *, label: str, step: int, model: str) -> None:
        """Write the record; the .json comes last, so that a record with it is complete.

        Raises:
            FileSystemError: the folder cannot be written.
        """
        intervals = [
            {figure.name: interval(score_result, figure).to_json() for figure in score_result.figures}
            for _, score_result in result.scored
        ]
        about = {
            "name": eval_set.name,
            "label": label,
            "step": step,
            "rows": eval_set.rows,
            "rows_sha256": eval_set.rows_sha256,
            "model": model,
            "seconds": round(result.seconds, 3),
            "answer_tokens": result.answer_tokens,
            "cut_prompts": result.cut_prompts,
            "settings": eval_set.settings,
            "scores": [
                {"score": name, "scored": score_result.to_json(), "intervals": figure_intervals}
                for (name, score_result), figure_intervals in zip(result.scored, intervals, strict=True)
            ],
        }
        lines = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in _lines(result))
        self._put(label, f"{eval_set.name}.jsonl", lines)
        self._put(label, f"{eval_set.name}.json", _pretty(about))

    def write_held_out(
        self,
        figures: dict[str, float],
        rows: Sequence[dict[str, Any]] = (),
        *,
        label: str,
        step: int,
        rows_sha256: str,
        model: str,
    ) -> None:
        """Write the loss on the held-out rows, and of rows that judge answers what was measured of each.

        Raises:
            FileSystemError: the folder cannot be written.
        """
        rest = dict(figures)
        loss, tokens, exponential = (
            rest.pop("eval_loss"),
            rest.pop("eval_tokens"),
            rest.pop("eval_perplexity", math.nan),
        )
        record: dict[str, Any] = {"loss": _finite(loss), "perplexity": _finite(exponential), "tokens": int(tokens)}
        if rest:
            record["figures"] = {name: _finite(value) for name, value in rest.items()}
        record |= {"step": step, "rows_sha256": rows_sha256, "model": model}
        if rows:
            record["judged"] = judged_figures(rows)
            self._put(label, f"{HELD_OUT}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._put(label, f"{HELD_OUT}.json", _pretty(record))

    def copy(self, name: str, *, old: str, new: str) -> None:
        """Copy the answers to another label: the best state was the last one."""
        for suffix in (".jsonl", ".json"):
            path = self.folder / old / f"{name}{suffix}"
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                if suffix == ".json" and name != HELD_OUT:
                    text = _pretty(json.loads(text) | {"label": new})
                self._put(new, path.name, text)

    def about(self, label: str, name: str) -> dict[str, Any] | None:
        """Return the content of NAME.json; None when it is not there, or torn."""
        try:
            content = json.loads((self.folder / label / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def judged(self, label: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return `judged_figures` of the base model and under a label, on the same rows; None where there are none."""
        before, now = (self.about(kept, HELD_OUT) or {} for kept in ("before", label))
        same = before.get("rows_sha256") == now.get("rows_sha256")
        return (before.get("judged") if same else None), now.get("judged")

    def holds(self, eval_set: EvalSet, *, label: str, step: int, model: str) -> bool:
        """Return whether this very model's answers to these very rows are kept already."""
        record = self.about(label, eval_set.name)
        wanted = {"step": step, "rows_sha256": eval_set.rows_sha256, "model": model, "settings": eval_set.settings}
        return record is not None and all(record.get(key) == value for key, value in wanted.items())

    def totals(self, label: str, name: str) -> dict[str, float]:
        """Return the figures of kept answers."""
        record = self.about(label, name)
        assert record is not None, "called after `holds`"
        return {
            key: value
            for score in record["scores"]
            for key, value in ScoreResult.from_json(score["scored"]).totals.items()
        }

    def row_ids(self, label: str, name: str) -> list[str]:
        """Return the ids of the rows, in order; none when they are not there."""
        try:
            with (self.folder / label / f"{name}.jsonl").open(encoding="utf-8") as lines:
                return [json.loads(line)["id"] for line in lines]
        except (OSError, ValueError, KeyError):
            return []

    def _put(self, label: str, name: str, text: str) -> None:
        path = self.folder / label / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        except OSError as error:
            raise FileSystemError(f"{path}: cannot be written: {error.strerror or error}") from None


def perplexity(loss: float) -> float:
    """Return the exponential of the loss; infinite where that is no number any more."""
    return math.exp(loss) if loss < 700 else math.inf


def model_key(*parts: Any) -> str:
    """Return a short name for the weights that answered."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lines(result: EvalResult) -> Iterator[dict[str, Any]]:
    for index, answer in enumerate(result.answers):
        scores = {
            name: none_if_nan(values[index])
            for _, score_result in result.scored
            for name, values in score_result.rows.items()
        }
        line: dict[str, Any] = {
            "id": answer.id,
            "prompt": answer.prompt,
            "reference": answer.reference,
            "answer": answer.text,
            "scores": scores,
            "row": dict(answer.row),
        }
        yield line | ({"logprobs": list(answer.logprobs)} if answer.logprobs else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pretty(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
