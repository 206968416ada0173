"""`unpaired`: one answer to a prompt and whether it is a good one, in the forms that people have.

The columns of a row without its label are those of `prompt_completion`, `messages`, `alpaca` or `sharegpt`. The label
is about the last answer: only that one is trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distft.data.formats import alpaca, messages, prompt_completion, sharegpt
from distft.data.samples import Conversation, FormatSpec, Group, Row, RowError, columns_of, kind_of

LABELS = ("label", "kto_tag")
"""The column of the label: TRL's, and LLaMA-Factory's."""
_ANSWERED = (prompt_completion.SPEC, messages.SPEC, alpaca.SPEC, sharegpt.SPEC)


def convert(row: Row) -> Group:
    """Return one document; `desirable_G` is 1 for a good answer and 0 for a bad one."""
    label = _label(row)
    answered = {name: value for name, value in row.items() if name not in LABELS}
    spec = next((spec for spec in _ANSWERED if spec.matches(answered)), None)
    if spec is None:
        needs = ", or ".join(spec.needs for spec in _ANSWERED)
        raise RowError(f"the row has a label and no answer ({columns_of(answered)}); expected {needs}")
    document: Any = spec.convert(answered)
    if isinstance(document, Conversation):
        document = replace(document, num_prompt=len(document.messages) - 1)
    return Group(documents=(document,), values=(float(label),))


def _label(row: Row) -> bool:
    names = [name for name in LABELS if name in row]
    if not names:
        raise RowError(f'missing "label"; the row has {columns_of(row)}')
    if len(names) > 1:
        raise RowError('the row has both "label" and "kto_tag"; keep one of them')
    label = row[names[0]]
    if isinstance(label, bool):
        return label
    if isinstance(label, int) and label in (0, 1):
        return bool(label)
    shown = f' "{label}"' if isinstance(label, str) else f" {label:g}" if isinstance(label, int | float) else ""
    raise RowError(f'"{names[0]}" is {kind_of(label)}{shown}, expected true (a good answer) or false (a bad one)')


def matches(row: Row) -> bool:
    """Return whether the row has a label and one answer."""
    answered = {name: value for name, value in row.items() if name not in LABELS}
    return len(answered) < len(row) and any(spec.matches(answered) for spec in _ANSWERED)


SPEC = FormatSpec(
    name="unpaired",
    needs='"prompt", "completion" (or the columns of messages, alpaca or sharegpt) and "label": true or false',
    matches=matches,
    convert=convert,
    reads=(*LABELS, *dict.fromkeys(name for spec in _ANSWERED for name in spec.reads or ())),
    example={"prompt": "2 + 2 =", "completion": " 4", "label": True},
    values=("desirable_G",),
    decisive=("desirable_G",),
)
