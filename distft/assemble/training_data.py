"""Prepares the rows of a run and splits them into the steps of this rank."""

from __future__ import annotations

import datetime
import json
import math
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import compatibility
from distft.core.errors import DataError
from distft.core.phase import PHASE
from distft.recipe import Recipe, check_steps

if TYPE_CHECKING:
    from distft.assemble.batch_layout import Layout
    from distft.columns.stored_logprobs import RowPass
    from distft.data.loader import EvalSteps, Steps
    from distft.data.store import Prepared
    from distft.recipe.schema import DataTable


PREPARING_SAYS_S = 10.0
"""Seconds between two words on how many rows are prepared."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Evaluation rows, and what must be known of the trained ones to ask the model anything."""

    eval_steps: EvalSteps | None
    fingerprint: dict[str, str]
    """sha256 of the prepared rows, by split."""
    largest_id: int
    """The largest id of all tokens in them."""
    stop_ids: tuple[int, ...]
    """What trained rows end with."""
    row_passes: tuple[RowPass, ...] = ()
    """The prepared rows of every split, for what is computed once over all of them."""


@dataclass(frozen=True, kw_only=True)
class Data(HeldOut):
    """Prepared rows, cut into this rank's steps."""

    steps: Steps
    longest: int
    """Tokens in the longest row."""
    mean_tokens: int
    """Tokens of a row on average."""


def load_data(recipe: Recipe, layout: Layout, rank: int, world: int, say: Say) -> Data:
    """Prepare the rows before any process group exists: however long it takes, no collective times out.

    Raises:
        DataError: rows that cannot be trained on, or that the recipe's `[data] overlap` refuses.
        RecipeError: they are longer than the model's positions, or too few for the recipe's steps.
    """
    from distft.data.loader import EvalSteps, Steps
    from distft.data.prepare import prepare
    from distft.data_quality import examine, refuse_overlap

    table, common = recipe.data, _common(recipe, say)
    rows = prepare(table, table.train, split="train", **common)
    compatibility.refuse_other_rows(recipe, rows.report, "train")
    if layout.single and rows.group_size > 1:
        raise DataError(
            f"this model trains on one document per forward ({layout.path.describe()}), and the rows of [[data.train]] "
            f"are groups of {rows.group_size}, which are trained in one"
        )
    micro = layout.micro_batch_size
    slice_: dict[str, Any] = {
        "micro_batch_size": micro,
        "rank": rank,
        "world": world,
        "single_documents": layout.single,
    }
    slice_["pad_to"] = micro * table.max_length if layout.path.compiled else None
    if table.overlap == "error":
        looking = {key: common[key] for key in ("cache_dir", "progress", "waiting")}
        care = examine(table, answers=recipe.eval.answers, **looking)
        refuse_overlap(care, table)
    plan = recipe.train
    steps = Steps(
        rows,
        table,
        seed=recipe.seed,
        epochs=plan.epochs,
        max_steps=plan.max_steps,
        global_batch_size=plan.global_batch_size,
        **slice_,
    )
    check_steps(recipe, steps.num_steps)
    longest = int(rows.lengths.max())
    compatibility.refuse_long_rows(recipe, rows.longest_document, "train")
    say(
        f"{rows.num_rows:,} rows, {steps.tokens_per_epoch:,} tokens an epoch "
        f"({steps.supervised_per_epoch:,} trained), {100 * steps.fill:.1f} % fill, {steps.num_steps:,} steps"
    )
    splits = {"train": rows}
    if table.eval:
        splits["eval"] = prepare(table, table.eval, split="eval", **common)
        compatibility.refuse_other_rows(recipe, splits["eval"].report, "eval")
        compatibility.refuse_long_rows(recipe, splits["eval"].longest_document, "eval")
    for split, prepared in splits.items():
        for source in prepared.report.sources:
            for line in source.messages():
                say(f"[[data.{split}]] {source.path}: {line}")
    return Data(
        steps=steps,
        eval_steps=EvalSteps(splits["eval"], table, **slice_) if table.eval else None,
        fingerprint={split: prepared.fingerprint for split, prepared in splits.items()},
        largest_id=max(prepared.report.largest_id for prepared in splits.values()),
        stop_ids=rows.report.stop_ids,
        longest=longest,
        mean_tokens=max(1, round(float(rows.lengths.mean()))),
        row_passes=tuple(
            _row_pass(prepared, table, slice_, steps if split == "train" else None)
            for split, prepared in splits.items()
        ),
    )


def _row_pass(prepared: Prepared, table: DataTable, slice_: dict[str, Any], steps: Steps | None) -> RowPass:
    """Return a pass over the rows; `steps`: of training, None for held-out rows."""
    import numpy as np

    from distft.columns.stored_logprobs import RowPass
    from distft.data.loader import EvalSteps

    def batches() -> Iterable[np.ndarray]:
        if steps is None:
            return [np.arange(prepared.num_rows)]
        return (steps.rows_in(step) for step in range(steps.num_steps))

    return RowPass(
        prepared=prepared,
        micro_batches=lambda rows, only: EvalSteps(rows, table, only=only, **slice_),
        batches=batches,
        trained=steps is not None,
        max_length=table.max_length,
    )


def with_date(recipe: Recipe, folder: Path, resume: Path | str = "auto") -> Recipe:
    """Return the recipe with the date that chat templates are given: its own, else that of the run which is continued,
    else today's. So a run that goes on tomorrow, or on another node, trains on the same rows.

    `folder` is the run's; `resume` a checkpoint of another run, or "never" for a run that starts anew.
    """  # noqa: D205
    from distft.data.fingerprint import today

    if recipe.data.date is not None:
        return recipe
    if isinstance(resume, Path):
        places = [resume / "state.json", resume.absolute().parents[1] / "manifest.json"]
    else:
        places = [*sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True), folder / "manifest.json"]
    dates = [] if resume == "never" else map(_date_noted, places)
    date = next(filter(None, dates), None) or today()
    return recipe.with_value(("data", "date"), date)


def _date_noted(file: Path) -> str | None:
    """Return the date that a checkpoint or manifest names; of older manifests the day of the run's start."""
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
        date = str(noted.get("date") or noted["started"])[:10]
        return datetime.date.fromisoformat(date).isoformat()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def load_held_out(
    recipe: Recipe, layout: Layout, rank: int, world: int, stop_ids: tuple[int, ...], say: Say
) -> HeldOut:
    """Return the evaluation rows alone, for a run whose training rows may be gone.

    Raises:
        DataError: rows that cannot be evaluated.
    """
    from distft.data.loader import EvalSteps
    from distft.data.prepare import prepare

    table = recipe.data
    if not table.eval:
        return HeldOut(eval_steps=None, fingerprint={}, largest_id=max(stop_ids), stop_ids=stop_ids)
    rows = prepare(table, table.eval, split="eval", **_common(recipe, say))
    compatibility.refuse_other_rows(recipe, rows.report, "eval")
    compatibility.refuse_long_rows(recipe, rows.longest_document, "eval")
    slice_: dict[str, Any] = {"micro_batch_size": layout.micro_batch_size, "rank": rank, "world": world}
    slice_["single_documents"] = layout.single
    return HeldOut(
        eval_steps=EvalSteps(rows, table, **slice_),
        row_passes=(_row_pass(rows, table, slice_, None),),
        fingerprint={"eval": rows.fingerprint},
        largest_id=max(rows.report.largest_id, *stop_ids),
        stop_ids=stop_ids,
    )


def _common(recipe: Recipe, say: Say) -> dict[str, Any]:
    from distft.data.prepared_folder import cache_folder

    tokenizer, revision = compatibility.tokenizer_of(recipe)
    common: dict[str, Any] = {"tokenizer": tokenizer, "revision": revision, "cache_dir": cache_folder(recipe.data)}
    common["virtual_tokens"] = recipe.method.spec.virtual_tokens(recipe.method.params)
    common["progress"] = Preparing(say)
    common["waiting"] = lambda: PHASE.enter("rows", patient=True)
    return common


def agree(rows: Data, gather: Callable[[Any], list[Any]]) -> None:
    """Check that all ranks train on the same rows, though each node may have prepared its own; collective.

    Raises:
        DataError: on all ranks; names the hosts that differ from rank 0's.
    """
    reports = gather((socket.gethostname(), rows.fingerprint))
    first, ours = reports[0]
    others = sorted({host for host, fingerprint in reports if fingerprint != ours})
    if others:
        raise DataError(
            f"the rows on {', '.join(others)} are not those on {first}: the sources, the tokenizer, the libraries or "
            "the date differ there  use files that all hosts share, or copy them anew"
        )


class Preparing:
    """Says now and then how far it is, and lets a preempted process go: preparing may outlast the grace period."""

    def __init__(self, say: Say) -> None:
        self._say, self._said_at = say, -math.inf

    def __call__(self, rows: int) -> None:
        """Report progress; called after every few rows.

        Raises:
            Preempted: this process has been asked to stop.
        """
        PHASE.enter("rows")
        if time.monotonic() - self._said_at >= PREPARING_SAYS_S:
            self._said_at = time.monotonic()
            self._say(f"preparing rows: {rows:,}")
