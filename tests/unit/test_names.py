"""A class name means one thing in the whole package, so a search for it finds one thing."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "distft"


def public_classes(source: str) -> list[str]:
    """Names of the public classes at the top level of a module, whatever `if` or `try` they stand in."""
    names: list[str] = []
    blocks: list[ast.AST] = [ast.parse(source)]
    for block in blocks:
        for node in ast.iter_child_nodes(block):
            if isinstance(node, ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                blocks.append(node)
    return [name for name in names if not name.startswith("_")]


def test_public_class_names_are_unique() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for name in public_classes(path.read_text(encoding="utf-8")):
            homes[name].append(str(path.relative_to(ROOT)))
    assert len(homes) > 200  # the tree was found and read
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_classes_are_found_wherever_a_module_defines_them() -> None:
    source = (
        "class A: ...\nif x:\n    class B: ...\nelse:\n    class _C: ...\ntry:\n    pass\nexcept E:\n    class D: ...\n"
    )
    assert sorted(public_classes(source)) == ["A", "B", "D"]
    assert public_classes("def f():\n    class Local: ...\nclass Outer:\n    class Inner: ...\n") == ["Outer"]


def test_the_glossary_names_what_exists() -> None:
    text = (ROOT.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    places = re.findall(r"\| `([a-z_/]+\.py)`(?: `(\w+)`)? \|$", text, flags=re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(places) == len(rows) > 20, "every row ends with a file, and a name in it"
    for file, name in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(?:class|def) {name}\b|^{name} = ", source, flags=re.MULTILINE), (file, name)
