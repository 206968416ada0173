"""A launcher's own report of a failure: left out where a rank has told how it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
class Failure:
    def __init__(self, exitcode):
        self.exitcode = exitcode


class ChildFailedError(Exception):
    failures = {at: Failure(code) for at, code in enumerate(CODES)}


raise ChildFailedError("at length")
"""


@pytest.mark.parametrize(
    ("codes", "code", "reported"),
    [([75, 75], 75, False), ([5], 5, False), ([9, 2], 9, False), ([1], 1, True), ([6, -9], 1, True), ([], 1, True)],
)
def test_only_what_nobody_has_told_is_reported(tmp_path: Path, codes: list[int], code: int, reported: bool) -> None:
    (tmp_path / "failing.py").write_text(MODULE.replace("CODES", repr(codes)))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "distft.core.launcher", "failing", "--x"],
        cwd=tmp_path, env={"PYTHONPATH": f"{root}:{tmp_path}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert ("at length" in done.stderr) == reported


def test_arguments_and_the_modules_own_end_arrive(tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text("import sys; print(sys.argv[1:], __name__); sys.exit(4)")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "distft.core.launcher", "ending", "--x", "1"],
        cwd=tmp_path, env={"PYTHONPATH": f"{root}:{tmp_path}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (4, "['--x', '1'] __main__")
