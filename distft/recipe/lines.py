"""The line of every key and value of a TOML document, which `tomllib` does not keep.

The scanner reads documents that `tomllib` has accepted, so it only has to find where things start and end.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

KeyPath = tuple[str | int, ...]
"""Way to a value: keys, and positions in arrays: `("data", "train", 0, "path")`."""

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_SCALAR = re.compile(
    r'''"""(?:\\.|[^\\])*?""""{0,2}'''  # a multi-line string may end in two quotes of its own
    r"""|'''.*?''''{0,2}"""
    r"""|"(?:\\.|[^"\\])*"|'[^']*'|[^,\]}#\n]+""",
    re.DOTALL,
)


def find_lines(text: str) -> dict[KeyPath, int]:
    """Return 1-based line of each table, key and array element of a valid TOML document, in the order of the text.

    A table that only exists through a longer header or a dotted key gets the line where it is first mentioned.
    """
    return _Scanner(text.replace("\r\n", "\n")).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self._line, self._counted = 1, 0

    def document(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        sizes: dict[KeyPath, int] = {}  # arrays of tables, and how many tables they have so far
        while self.more():
            if self.text.startswith("[[", self.position):
                line, array = self.line(), self.header("]]", sizes)
                position = sizes.setdefault(array, 0)
                sizes[array] += 1
                table = (*array, position)
                self.lines[table] = line
            elif self.text[self.position] == "[":
                table = self.header("]", sizes)
            else:
                self.pair(table)
        return self.lines

    def header(self, end: str, sizes: dict[KeyPath, int]) -> KeyPath:
        self.position += len(end)
        line, path = self.line(), ()
        self.skip(_BLANK)
        keys = self.dotted()
        for depth, key in enumerate(keys, start=1):
            path = (*path, key)
            self.lines.setdefault(path, line)
            if path in sizes and depth < len(keys):
                path = (*path, sizes[path] - 1)  # [a.b] below [[a]] speaks of the last a
        self.skip(_BLANK)
        self.position += len(end)
        return path

    def pair(self, table: KeyPath) -> None:
        line, path = self.line(), table
        for key in self.dotted():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.skip(_EQUALS)
        self.value(path)

    def value(self, path: KeyPath) -> None:
        match self.text[self.position]:
            case "[":
                self.items("]", lambda position: self.element((*path, position)))
            case "{":
                self.items("}", lambda _: self.pair(path))
            case _:
                self.skip(_SCALAR)

    def element(self, path: KeyPath) -> None:
        self.lines[path] = self.line()
        self.value(path)

    def items(self, end: str, read: Callable[[int], None]) -> None:
        self.position += 1
        position = 0
        while self.more() and self.text[self.position] != end:
            read(position)
            position += 1
            self.skip(_BLANK)
            self.position += self.text[self.position] == ","
        self.position += 1

    def dotted(self) -> list[str]:
        keys = [_unquoted(self.skip(_KEY_PART))]
        while _DOT.match(self.text, self.position):
            self.skip(_DOT)
            keys.append(_unquoted(self.skip(_KEY_PART)))
        return keys

    def more(self) -> bool:
        self.skip(_BLANK)
        return self.position < len(self.text)

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match, f"the scanner lost its way at line {self.line()} of a document that tomllib accepts"
        self.position = match.end()
        return match[0]

    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line


def _unquoted(part: str) -> str:
    return next(iter(tomllib.loads(f"{part} = 0"))) if part[0] in "\"'" else part
