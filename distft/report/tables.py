"""Tables and small blocks that every section uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distft.report.html import Child, Html, h

_FEW = 4
"""Columns up to which a table is only as wide as it must be: an eye loses its line on the way to a far figure."""


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]], *, numbers: Iterable[int] = ()) -> Html:
    """Return a table that scrolls sideways on a narrow screen, by keyboard too; a row's first cell is its heading.

    `numbers`: columns that are set flush right.
    """
    right = frozenset(numbers)
    head = h("tr", [_head(text, "num" if index in right else None) for index, text in enumerate(heads)])
    body = [
        h(
            "tr",
            h("th", row[0], scope="row", class_="num" if 0 in right else None),
            [h("td", cell, class_="num" if index in right else None) for index, cell in enumerate(row[1:], start=1)],
        )
        for row in rows
    ]
    slim = "slim" if len(heads) <= _FEW else None
    whole = h("table", h("caption", caption), h("thead", head), h("tbody", body), class_=slim)
    return h("div", whole, class_="scroll", role="region", tabindex=0, aria_label=caption)


def _head(text: str, kind: str | None) -> Html:
    """Return a column's heading; `(picture)` is read out and not shown, as a drawing is below it."""
    hidden = text.startswith("(")
    return h("th", h("span", text.strip("()"), class_="vh") if hidden else text, scope="col", class_=kind)


def facts(caption: str, pairs: Iterable[tuple[str, Child]]) -> Html:
    """Return two columns: what, and what it is; pairs without a value are left out."""
    rows = [h("tr", h("th", name, scope="row"), h("td", value)) for name, value in pairs if value not in ("", None)]
    whole = h("table", h("caption", caption, class_="vh"), h("tbody", rows), class_="facts")
    return h("div", whole, class_="scroll", role="region", tabindex=0, aria_label=caption)


def section(name: str, title: str, *content: Child) -> Html:
    """Return a part of the page that the contents list links to."""
    return h("section", h("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")


def missing(*content: Child) -> Html:
    """Return what is not there, and how to get it."""
    return h("p", *content, class_="missing")


def fold(title: str, *content: Child, shut: bool = True) -> Html:
    """Return a folded part that most readers need not see at once."""
    return h("details", h("summary", title), *content, open=not shut)
