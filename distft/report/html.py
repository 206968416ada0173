"""HTML by function calls: text is escaped because it is text; markup is a type of its own."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from importlib.resources import files
from typing import TypeAlias

VOID = frozenset({"br", "hr", "meta", "link", "img", "input", "line", "path", "rect", "circle"})


class Html(str):
    """Markup that is whole and safe: only `h` and `page` make it."""

    __slots__ = ()

    def __html__(self) -> str:
        """Return itself: what template languages ask markup for, so that they do not escape it again."""
        return self


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute: TypeAlias = str | int | float | bool | None


def h(tag: str, *children: Child, **attributes: Attribute) -> Html:
    """Return an element. `class_` is written class, `aria_label` aria-label; None and False leave an attribute out."""
    text = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in VOID:
        return Html(f"<{tag}{text}>" if tag not in ("line", "path", "rect", "circle") else f"<{tag}{text}/>")
    return Html(f"<{tag}{text}>{join(children)}</{tag}>")


def join(children: Child) -> Html:
    """Return the children one after another; plain text in them is escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(html.escape(_printable(str(children)), quote=False))
    return Html("".join(join(child) for child in children))


def page(title: str, *body: Child) -> str:
    """Return a whole document. Its policy forbids every script and every request, whatever a row holds."""
    style = files("distft.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="generator", content="distft"),
        h("link", rel="icon", href="data:,"),  # otherwise a browser asks for /favicon.ico
        h("title", title),
        h("style", Html(style)),
    )
    return f"<!doctype html>\n{h('html', head, h('body', *body), lang='en')}\n"


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-") if name not in _CASED else _CASED[name]
    return f" {name}" if value is True else f' {name}="{html.escape(_printable(str(value)))}"'


_CASED = {"viewBox": "viewBox", "preserveAspectRatio": "preserveAspectRatio"}


def _printable(text: str) -> str:
    """Remove control characters, which are no HTML, and those that turn the direction of writing."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    kind = unicodedata.category(char)
    hidden = (kind == "Cc" and char not in "\n\t") or kind == "Cs" or unicodedata.bidirectional(char) in _TURNS
    return "\ufffd" if hidden else char


_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
