"""Tables of what is measured: where rows come from, and what the model is asked about them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from distft.core.registry import Params


class SourceTable(Params):
    """Rows from one file, folder or hub dataset."""

    path: str = Field(min_length=1, examples=["train.jsonl"])
    """A file of rows (json, jsonl, parquet, arrow, csv, tsv or txt), a glob or folder of them, or a hub dataset."""
    format: str = "auto"
    """Shape of a row; auto looks at the first rows and says what it decided."""
    split: str | None = Field(default=None, min_length=1)
    """Split of a hub dataset, or of a folder that holds several."""
    subset: str | None = Field(default=None, min_length=1)
    """Configuration name of a hub dataset, or a folder inside a folder."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only this many rows."""
    columns: dict[str, str] | None = None
    """Renames columns: theirs = ours (the name the format expects)."""
    ignore: tuple[str, ...] = ()
    """Columns, and keys of messages, that are left out on purpose."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        if isinstance(value, list):
            raise ValueError('is a list: write one table for each path, or a glob such as "data/*.jsonl"')
        return value


class AnswersTable(Params):
    """Rows that the model answers, and how its answers are judged."""

    name: str = Field(min_length=1, examples=["gsm8k"])
    """What files and figures are called: `NAME.FIGURE`."""
    path: str | None = Field(default=None, min_length=1)
    """As in [[data.eval]], or spot:general, spot:refusals, lm-eval:TASK; the rows of [[data.eval]] unless set."""
    format: str = "auto"
    """Shape of a row; auto looks at the first rows."""
    split: str | None = Field(default=None, min_length=1)
    """Split of a hub dataset."""
    subset: str | None = Field(default=None, min_length=1)
    """Configuration name of a hub dataset."""
    max_rows: int | None = Field(default=None, ge=1)
    """Ask only this many rows, the first ones."""
    columns: dict[str, str] | None = None
    """Renames columns: theirs = ours."""
    ignore: tuple[str, ...] = ()
    """Keys of messages that are left out on purpose."""
    prompt: str | None = Field(default=None, min_length=1)
    """Column that holds the question, for rows that are of no data format."""
    reference: str | None = Field(default=None, min_length=1)
    """Column that holds the right answer, beside `prompt`."""
    ask_as: Literal["auto", "chat", "text"] = "auto"
    """How `prompt`, or a task of lm-eval, is asked: as what a user says, or as raw text; auto = as the trained rows."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Of a task of lm-eval: solved rows shown before the question; as the task says unless set."""
    scores: tuple[dict[str, Any], ...] = Field(default=(), examples=[[{"name": "exact_match"}]])
    """How answers are judged: name and settings of each score."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0)
    """0 = always the likeliest token; else answers are drawn, each row from its own seed."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's end tokens."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows at a time on one GPU; changes no answer."""
    every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between answers during training; they are slow, so off unless set."""

    @property
    def source(self) -> SourceTable | None:
        """Where its rows come from; None: from [[data.eval]]."""
        if self.path is None:
            return None
        return SourceTable(
            path=self.path,
            format=self.format,
            split=self.split,
            subset=self.subset,
            columns=self.columns,
            ignore=self.ignore,
        )


class EvalTable(Params):
    """When the loss on held-out rows is measured, and what the model is asked."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations during training."""
    at_start: bool = True
    """Evaluate before the first step: the base model, which everything after is compared with."""
    at_end: bool = True
    """Evaluate after the last step."""
    early_stop: int | None = Field(default=None, ge=1)
    """End training after so many evaluations without a better one."""
    best_by: str = "eval_loss"
    """What makes an evaluation better: eval_loss, eval_FIGURE of the objective, or NAME.FIGURE of a set of answers."""
    answers: tuple[AnswersTable, ...] = ()
    """Sets of rows that the model answers, before and after."""
