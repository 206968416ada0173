"""Every row of the fault matrix has a test, and the table that says how they went cannot hide a hole."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from matrix import ROWS

TESTS = Path(__file__).resolve().parents[1]


def marked_rows(source: str) -> Iterator[int]:
    """The numbers in `pytest.mark.row(...)`, read and not run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row":
            yield from (ast.literal_eval(argument) for argument in node.args)


def test_every_row_has_a_marked_test() -> None:
    marked = {row for path in TESTS.rglob("test_*.py") for row in marked_rows(path.read_text(encoding="utf-8"))}
    assert not marked - set(ROWS), "there is no such row"
    assert not set(ROWS) - marked, "a row without a test"


def test_rows_are_the_matrixs() -> None:
    assert list(ROWS) == list(range(1, 47))


def ran(folder: Path, text: str, *options: str) -> tuple[int, str, str]:
    """(exit code, output, table) of a run of one test file with the table."""
    (folder / "test_rows.py").write_text("import pytest\n" + text)
    plugin = ["-p", "fault_table", "-p", "no:cacheprovider", "--fault-table", "out/table.md"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *options, "test_rows.py"]
    path = {"PYTHONPATH": str(TESTS / "helpers")}
    done = subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr, (folder / "out/table.md").read_text()


ALL = f"""
@pytest.mark.row(*{sorted(ROWS)})
def test_all():
    pass
"""


def test_a_whole_matrix_passes_and_says_where_it_ran(tmp_path: Path) -> None:
    code, said, table = ran(tmp_path, ALL)
    assert code == 0, said
    assert "| 1 | kill -9 one rank at a random step | `test_rows.py` (1) | passed | 0.0 |" in table
    assert "| 46 | early stop and best after a resume | `test_rows.py` (1) | passed |" in table
    assert "cores (" in table
    assert "commit " in table


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_a_hole_fails_the_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    text = ALL.replace("[1, 2, 3, ", "[1, ") + (
        "@pytest.mark.row(2)\n@pytest.mark.parametrize('n', [1, 2])\ndef test_two(n):\n    pass\n"
        "@pytest.mark.row(4)\ndef test_skipped():\n    pytest.skip('not here')\n"
    )
    code, said, table = ran(tmp_path, text, *workers)
    assert code == 1
    assert "row 3 has no test: kill -9 the launcher" in said
    assert "| 3 | kill -9 the launcher |  | missing | 0.0 |" in table
    assert "`test_rows.py` (2) | passed |" in table
    assert "`test_rows.py` (2, 1 skipped) | passed |" in table


def test_a_failed_test_fails_its_row(tmp_path: Path) -> None:
    failing = "@pytest.fixture\ndef broken():\n    assert 0\n@pytest.mark.row(7)\ndef test_seven(broken):\n    pass\n"
    code, _, table = ran(tmp_path, ALL + failing)
    assert code == 1
    assert "`test_rows.py` (2, 1 failed) | failed |" in table
