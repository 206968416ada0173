"""A run folder becomes events, checkpoints and figures of its job. The folder is the truth, and is read again."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from distft.core.files import read_json_object
from distft.service.job_folder import JobFolder
from distft.service.jobs import add_event
from distft.service.tables import CheckpointRow, JobRow, new_id

RECENT_S = 30.0
REWARD, HELD_OUT_REWARD = "reward_total", "validation.grade"
"""Figures of jobs of the method reinforcement in metrics.jsonl."""
ACCURACY = "eval_token_accuracy"
_OF_CHECKPOINTS = (
    ("loss", "train_loss"), ("eval_loss", "full_valid_loss"), (ACCURACY, "full_valid_mean_token_accuracy")
)  # fmt: skip
"""(key of metrics.jsonl, OpenAI's name of it)."""
_SHOWN = ("grad_norm", "tokens_per_s", "reward_margin", "reward_accuracy", "answer_tokens", "unscored_answers")
MOST_AT_ONCE = 500
"""Records that become events in one transaction."""


def read_progress(session: Session, row: JobRow, folder: JobFolder) -> bool:
    """Take in what metrics.jsonl and the checkpoints say more than last time; return whether there was anything.

    The session writes, and holds the job's row. A run that went back to a checkpoint writes its file anew: steps that
    are events already make no second one.
    """
    if row.num_steps is None:
        manifest = read_json_object(folder.run / "manifest.json")
        row.num_steps = manifest.get("num_steps") if isinstance(manifest.get("num_steps"), int) else None
    records, read_to = _new_records(folder, row.read_to)
    row.read_to = read_to
    for record in records:
        step = int(record["step"])
        if "eval_loss" in record or HELD_OUT_REWARD in record:
            _add_evaluation(session, row, step, record)
        elif "loss" in record and step > row.step:
            row.step = step
            _add_step(session, row, step, record)
    added = _add_checkpoints(session, row, folder)
    if records:
        row.estimated_finish = _estimate(row, records)
    return bool(records) or added


def _new_records(folder: JobFolder, read_to: int) -> tuple[list[dict[str, Any]], int]:
    """Return whole lines behind an offset, and where they end; from the start where the file was written anew."""
    path = folder.run / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if read_to > size or not _ends_line(file, read_to):
                read_to = 0
            file.seek(read_to)
            records: list[dict[str, Any]] = []
            while len(records) < MOST_AT_ONCE and (line := file.readline()).endswith(b"\n"):
                read_to += len(line)
                if isinstance(record := _record(line), dict) and isinstance(record.get("step"), int):
                    records.append(record)
    except FileNotFoundError:
        return [], 0
    return records, read_to


def _record(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut by a kill, and followed by a line of its own
        return None


def _ends_line(file: Any, position: int) -> bool:
    if position == 0:
        return True
    file.seek(position - 1)
    return file.read(1) == b"\n"


def _add_step(session: Session, row: JobRow, step: int, record: dict[str, Any]) -> None:
    of = f"/{row.num_steps}" if row.num_steps is not None else ""
    loss = record["loss"]
    text = f"{loss:.4f}" if isinstance(loss, float) else str(loss)
    data = {"step": step, "train_loss": loss, "total_steps": row.num_steps, "learning_rate": record.get("lr")}
    data |= {key: record[key] for key in _SHOWN if key in record}
    message = f"Step {step}{of}: training loss={text}"
    if isinstance(reward := record.get(REWARD), float):
        data["train_reward_mean"] = reward
        message += f", reward={reward:.4f}"
    add_event(session, row, message, type="metrics", data=data)


def _add_evaluation(session: Session, row: JobRow, step: int, record: dict[str, Any]) -> None:
    key, what, name = (
        ("eval_loss", "full validation loss", "full_valid_loss")
        if "eval_loss" in record
        else (HELD_OUT_REWARD, "validation reward", "valid_reward_mean")
    )
    value = record[key]
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    data = {"step": step, name: value, "tokens": record.get("eval_tokens")}
    if isinstance(accuracy := record.get(ACCURACY), float):
        data["full_valid_mean_token_accuracy"] = accuracy
    message = f"Step {step}: {what}={text}"
    # a run that was started again may make an evaluation again
    known = session.scalars(select_event(row, message)).first()
    if known is None:
        add_event(session, row, message, type="metrics", data=data)


def select_event(row: JobRow, message: str) -> Any:
    """Return the query of a job's events with this message."""
    from distft.service.tables import EventRow

    return select(EventRow.id).where(EventRow.job_id == row.id, EventRow.message == message).limit(1)


def _add_checkpoints(session: Session, row: JobRow, folder: JobFolder) -> bool:
    """Keep the list of checkpoints equal to the committed ones in the run folder; return whether there are more.

    One whose step is no event yet waits for it: its record may never come, if the run was killed meanwhile.
    """
    there = set(committed_steps(folder))
    known = {
        point.step: point for point in session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == row.id))
    }
    new = sorted(step for step in there - known.keys() if step <= row.step)
    for step in new:
        name = f"{row.fine_tuned_model}:ckpt-step-{step}"
        session.add(
            CheckpointRow(
                id=new_id("ftckpt_"), job_id=row.id, project_id=row.project_id, step=step, created_at=int(time.time()),
                name=name, metrics=_metrics_at(folder, step),
            )
        )  # fmt: skip
        add_event(session, row, f"Checkpoint created at step {step}", data={"step": step, "model": name})
        session.flush()
    for step in known.keys() - there:
        session.delete(known[step])
    return bool(new)


def committed_steps(folder: JobFolder) -> Iterator[int]:
    """Yield the steps of whole checkpoints."""
    for path in (folder.run / "checkpoints").glob("step-*[0-9]"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and int(number) > 0 and (path / "MANIFEST.json").is_file():
            yield int(number)


def _metrics_at(folder: JobFolder, step: int) -> dict[str, float]:
    metrics: dict[str, float] = {"step": float(step)}
    for record in all_records(folder):
        if record.get("step") == step:
            for key, name in _OF_CHECKPOINTS:
                if isinstance(record.get(key), float):
                    metrics[name] = record[key]
    return metrics


def all_records(folder: JobFolder) -> Iterator[dict[str, Any]]:
    """Yield the records of metrics.jsonl."""
    try:
        lines = (folder.run / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        if isinstance(record := _record(line), dict) and isinstance(record.get("step"), int):
            yield record


def result_csv(folder: JobFolder) -> bytes:
    """Return the result file as OpenAI writes it: a line for each step."""
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    rows: dict[int, dict[str, Any]] = {}
    for record in all_records(folder):
        step = int(record["step"])
        values = rows.setdefault(step, {"step": step})
        if "loss" in record:
            values["train_loss"] = record["loss"]
        if "eval_loss" in record:
            values["valid_loss"] = record["eval_loss"]
        if ACCURACY in record:
            values["valid_mean_token_accuracy"] = record[ACCURACY]
        if "reward_accuracy" in record:
            values["train_accuracy"] = record["reward_accuracy"]
        for key, name in ((REWARD, "train_reward_mean"), (HELD_OUT_REWARD, "valid_reward_mean")):
            if key in record:
                values[name] = record[key]
    columns += [
        name for name in ("train_reward_mean", "valid_reward_mean") if any(name in row for row in rows.values())
    ]
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows) if step > 0)
    return text.getvalue().encode()


def trained_tokens(folder: JobFolder) -> int | None:
    """Return the tokens that were read in all steps."""
    tokens = [record["tokens"] for record in all_records(folder) if isinstance(record.get("tokens"), int)]
    return max(tokens, default=None)


def _estimate(row: JobRow, records: list[dict[str, Any]]) -> int | None:
    took = [record["step_s"] for record in records if isinstance(record.get("step_s"), int | float)]
    if not took or row.num_steps is None:
        return row.estimated_finish
    return int(time.time() + sum(took) / len(took) * max(0, row.num_steps - row.step))
