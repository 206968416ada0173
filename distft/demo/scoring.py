"""Marks for a generated answer: is it in the fixed format, and is what it says right?"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distft.demo.incidents import ACTIONS, COMPONENTS, SEVERITIES, Style

_SUMMARY = r"\S+(?: \S+){2,}"
"""One line of at least three words."""
_NEXT = rf"(?:{'|'.join(ACTIONS)})(?: \S+)+"
"""A known action and what to do it to."""
_LINES = re.compile(
    rf"severity: (?P<severity>{'|'.join(SEVERITIES)})\n"
    rf"component: (?P<component>{'|'.join(COMPONENTS)})\n"
    rf"summary: (?P<summary>{_SUMMARY})\n"
    rf"next: (?P<next>{_NEXT})"
)
_KEYS = ["severity", "component", "summary", "next"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one answer earned."""

    conforms: bool
    """Exact keys in order, closed vocabularies, nothing before or after."""
    severity_match: bool
    """Conforms, and names the severity of the reference answer."""
    all_right: bool
    """Conforms, and every field is the reference's."""


def score(row: Mapping[str, str], generated: str, style: Style) -> Score:
    """Mark `generated` against the reference completion of `row`; `generated` ends where the model's answer ends."""
    answer = parse(generated, style)
    reference = parse(row["completion"], style)
    assert reference is not None, f"a reference answer breaks its own format: {row['completion']!r}"
    return Score(
        conforms=answer is not None,
        severity_match=answer is not None and answer["severity"] == reference["severity"],
        all_right=answer == reference,
    )


def parse(text: str, style: Style) -> dict[str, str] | None:
    """Return the four fields of an answer that keeps the format to the letter, else None."""
    if style == "lines":
        match = _LINES.fullmatch(text)
        return match.groupdict() if match else None
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError):
        return None
    # Pairs, not a dict: a dict would hide a key given twice. Writing it back catches stray whitespace.
    if not isinstance(pairs, list) or [pair[0] for pair in pairs if isinstance(pair, tuple)] != _KEYS:
        return None
    answer = dict(pairs)
    if not all(isinstance(value, str) for value in answer.values()):
        return None
    if json.dumps(answer, separators=(",", ":")) != text:
        return None
    lines = "\n".join(f"{key}: {value}" for key, value in answer.items())
    return answer if _LINES.fullmatch(lines) else None
