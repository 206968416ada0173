"""Columns that a format does not read: those that would change what a row means are refused, the others counted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from distft.data.samples import Row, RowError

MEANINGFUL: dict[str, str] = {
    **dict.fromkeys(("label", "labels", "kto_tag"), "says whether, or as what, a row counts"),
    **dict.fromkeys(
        (
            "image",
            "images",
            "image_path",
            "image_url",
            "pixel_values",
            "video",
            "videos",
            "audio",
            "audios",
            "media",
            "objects",
        ),
        "is not text, and only text is trained",
    ),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output"),
        "is one of two answers to be compared",
    ),
    **dict.fromkeys(
        ("score", "scores", "score_chosen", "score_rejected", "rating", "reward", "rewards", "advantage", "margin"),
        "says how good a row is",
    ),
    **dict.fromkeys(
        (
            *("weight", "weights", "sample_weight", "loss_weight", "loss_scale", "loss_mask", "train", "trainable"),
            *("completion_mask", "assistant_mask", "assistant_masks", "response_mask", "train_on_turn"),
        ),
        "says how much of a row is trained",
    ),
    **dict.fromkeys(("tools", "functions"), "says what the model may call"),
    **dict.fromkeys(("system", "system_prompt"), "is what the model is told first"),
    **dict.fromkeys(("history", "context", "documents"), "is what the answer refers to"),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "is what the model should think first"),
    "chat_template_kwargs": "changes how the chat template renders the row",
}
"""Names under which datasets keep something without which a row means something else, and why."""
INDEX = ("", "Unnamed: 0", "__index_level_0__")
"""What pandas calls a table's index when it is written as a column: it says nothing."""
_MISSPELT = 0.85
"""Likeness of names from which one is taken for a misspelling of the other."""


def unread_columns(row: Row, reads: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """Return the columns of the row that its format does not read.

    Args:
        row: under the names its format expects.
        reads: what the format reads.
        ignore: what the source's table leaves out on purpose.

    Raises:
        RowError: one of them would change what the row means, or is a column of the format misspelt.
    """
    unread = [name for name in row if name not in reads and name not in INDEX]
    for name in unread:
        if name in ignore or _is_empty(row[name]):
            continue
        fix = f'  rename it with columns, or say ignore = ["{name}"] in the source\'s table to leave it out on purpose'
        meaning = MEANINGFUL.get(name) or MEANINGFUL.get(name.lower())
        absent = [column for column in reads if column not in row]
        if name not in MEANINGFUL and (meant := difflib.get_close_matches(name.lower(), absent, n=1, cutoff=_MISSPELT)):
            raise RowError(f'the column "{name}" is not read, did you mean "{meant[0]}"?{fix}')
        if meaning:
            raise RowError(f'the column "{name}" {meaning}, and this format does not read it{fix}')
    return unread


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
