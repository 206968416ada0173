"""The scanner finds every key that tomllib finds, at the line where it is written."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.recipe.lines import KeyPath, find_lines
from distft.recipe.toml_text import is_array, is_table, toml_key, toml_text, toml_value


def paths_of(value: object, at: KeyPath = ()) -> set[KeyPath]:
    inside = list(value.items()) if is_table(value) else list(enumerate(value)) if is_array(value) else []
    return {at} - {()} | {path for step, inner in inside for path in paths_of(inner, (*at, step))}


def test_a_recipe() -> None:
    text = """\
# [no.header] no = "key"
name = "run" # or = "this"

[model]
path = 'a # b "'
"quoted key"="x"
[[data.train]]
path = "a"
  [data.train.columns]   # of the first source
  q.a = "b"
[[ data . train ]]
path = \"\"\"
[not]
a = "header" \\\"\"\" \"\"\"\"\"
split = '''
]'''''
[ data ]
packing = true
[optim]
betas = [ # two
  0.9,

  0.999, # the last
]
nested = { a = [{ b = 1 }, { b = 2 }], "c.d" = 'x}' }
when = 1979-05-27 07:32:00 # a date with a space
last = 1"""
    lines = find_lines(text)
    assert set(lines) == paths_of(tomllib.loads(text))
    assert lines == {
        ("name",): 2,
        ("model",): 4,
        ("model", "path"): 5,
        ("model", "quoted key"): 6,
        ("data",): 7,
        ("data", "train"): 7,
        ("data", "train", 0): 7,
        ("data", "train", 0, "path"): 8,
        ("data", "train", 0, "columns"): 9,
        ("data", "train", 0, "columns", "q"): 10,
        ("data", "train", 0, "columns", "q", "a"): 10,
        ("data", "train", 1): 11,
        ("data", "train", 1, "path"): 12,
        ("data", "train", 1, "split"): 15,
        ("data", "packing"): 18,
        ("optim",): 19,
        ("optim", "betas"): 20,
        ("optim", "betas", 0): 21,
        ("optim", "betas", 1): 23,
        ("optim", "nested"): 25,
        ("optim", "nested", "a"): 25,
        ("optim", "nested", "a", 0): 25,
        ("optim", "nested", "a", 0, "b"): 25,
        ("optim", "nested", "a", 1): 25,
        ("optim", "nested", "a", 1, "b"): 25,
        ("optim", "nested", "c.d"): 25,
        ("optim", "when"): 26,
        ("optim", "last"): 27,
    }


CORNERS = [
    "",
    "\n",
    "a=1",
    "a = 1 # b",
    "[a]",
    "a.b.c=[]",
    'a=""',
    "a=''",
    'a=""""""',
    "a=''''''",
    "a={}",
    'a = """"x""""',
    'a = """x"""""\nb = 1',
    "a = '''x'''''\nb = 1",
    r'a = "\\" # "',
    r'a = "\"" # b = 1',
    "a = [[],[[]],\n] # ]\nb = 1",
    '"" = 1',
    r'"a\u0062" = 1',
    "'a.b' . \"c\" = 1",
    "a = 1\r\n[d]\r\ne = 1\r\n",
    "[[a]]\n[[a.b]]\n[a.b.c]\n[[a]]\n[a.b]",
]


@pytest.mark.parametrize("text", CORNERS)
def test_corners(text: str) -> None:
    assert set(find_lines(text)) == paths_of(tomllib.loads(text))


SCALARS = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.sampled_from(["# no comment", "]]", "}", "a = 1", '"""', "'''", "\\", "[x]\n"])
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(["a", "b", "a.b", "[a]", "#"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
DOCUMENTS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=4)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_what_is_printed_is_read_again_with_every_line(content: dict[str, Any]) -> None:
    text = toml_text(content)
    assert tomllib.loads(text) == content
    lines = find_lines(text)
    assert set(lines) == paths_of(content)
    written = text.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert toml_key(path[-1]) in written[line - 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(KEYS, SCALARS, st.integers(0, 3)), max_size=6, unique_by=lambda pair: pair[0]))
def test_lines_are_exact_between_comments_and_blank_lines(pairs: list[tuple[str, Any, int]]) -> None:
    text, expected = "", {}
    for key, value, gap in pairs:
        text += "  # key = 1 [x]\n" * gap + "\n" * gap
        expected[(key,)] = text.count("\n") + 1
        text += f"\t{toml_key(key)} = {toml_value(value)} # {gap}\n"
    assert find_lines(text) == expected
