"""The run folder: what it says of a run, and of how it ended."""

import hashlib
import importlib.metadata
import json
import platform
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from distft.core.errors import FileSystemError
from distft.core.phase import PHASE
from distft.core.types import TrainState
from distft.run_folder import RunFolder

FACTS = {"engine": "solo", "world": 1, "seed": 42, "data": {"train": "ab12"}, "parameters": {"total": 7}}


def ended(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


# -- exit.json -------------------------------------------------------------------------------------------------------


def test_the_end_is_told_with_step_host_and_rank(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.end(code=0, reason="done", rank=0, state=TrainState(step=12, samples=96), recipe_sha256="ab12")
    said = ended(tmp_path / "run")
    assert said.pop("time").endswith("+00:00")
    assert {key: said[key] for key in ("code", "reason", "step", "host", "rank")} == {
        "code": 0, "reason": "done", "step": 12, "host": socket.gethostname(), "rank": 0,
    }  # fmt: skip


def test_the_first_failure_is_the_one_that_stays(tmp_path: Path) -> None:
    """The other ranks fail because of it, and rank 0 may even end well before it notices."""
    first, second, writer = (RunFolder(tmp_path / "run", writes=writes) for writes in (False, False, True))
    first.end(code=5, reason="numeric: step 3: loss nan", rank=3)
    second.end(code=6, reason="hang: rank 3 is silent", rank=1)
    writer.end(code=0, reason="done", rank=0)
    assert (ended(tmp_path / "run")["code"], ended(tmp_path / "run")["rank"]) == (5, 3)


def test_other_ranks_do_not_tell_success(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", writes=False).end(code=0, reason="done", rank=1)
    assert not (tmp_path / "run/exit.json").exists()


def test_how_an_earlier_start_ended_is_forgotten_once_training_starts(tmp_path: Path) -> None:
    """Whoever is killed without a word must not look like the start before it."""
    RunFolder(tmp_path / "run", writes=True).end(code=3, reason="data: no rows", rank=0)
    writer, other = (RunFolder(tmp_path / "run", writes=writes) for writes in (True, False))
    other.start("", FACTS)
    assert ended(tmp_path / "run")["code"] == 3, "only the rank that writes clears it"
    writer.start("", FACTS)
    assert not (tmp_path / "run/exit.json").exists()
    other.end(code=5, reason="numeric", rank=1)
    assert ended(tmp_path / "run")["code"] == 5


def test_a_start_that_fails_before_training_replaces_what_an_earlier_one_said(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", writes=True).end(code=3, reason="data: no rows", rank=0)
    PHASE.begin()  # what every start does
    RunFolder(tmp_path / "run", writes=True).end(code=2, reason="recipe: no such model", rank=0)
    assert ended(tmp_path / "run")["code"] == 2


def test_a_rank_that_comes_late_leaves_the_word_of_the_first_to_fail(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run", writes=True).end(code=3, reason="data: row 7", rank=0)
    late = RunFolder(tmp_path / "run", writes=False)
    assert not late.end(code=6, reason="hang: rank 0 is gone", rank=1)
    assert ended(tmp_path / "run")["reason"] == "data: row 7"


def test_a_disk_that_fails_at_the_end_does_not_hide_the_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=True)
    (tmp_path / "run").rmdir()
    folder.end(code=5, reason="numeric", rank=0)  # nothing to write into, and nothing raised


# -- where a folder cannot be ----------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    began = time.monotonic()
    with pytest.raises(FileSystemError) as said:
        RunFolder(path, writes=True)
    assert time.monotonic() - began < 2
    assert said.value.exit_code == 8
    assert str(said.value).startswith(f"{path}: cannot be written (")
    assert str(said.value).endswith("choose another output_dir (--output-dir DIR)")
    return str(said.value)


@pytest.mark.row(31)
def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert "(File exists)" in refused(tmp_path / "run")
    assert "(Not a directory)" in refused(tmp_path / "run" / "inside")


@pytest.mark.row(31)
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_place_that_takes_no_files() -> None:
    """/proc takes none from anybody, root included."""
    refused(Path("/proc/runs/name"))
    refused(Path("/proc/self"))


@pytest.mark.row(31)
def test_missing_parents_are_made_and_nothing_is_left_of_the_probe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a/b/run", writes=True)
    assert list(folder.path.iterdir()) == []
    assert (folder.metrics.name, folder.final.name, folder.tensorboard.name) == (
        "metrics.jsonl", "final", "tensorboard",
    )  # fmt: skip


# -- what it ran on --------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_ran_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.start('name = "run"\n', FACTS)
    assert (tmp_path / "run/recipe.toml").read_text() == 'name = "run"\n'
    said = json.loads((tmp_path / "run/manifest.json").read_text())
    assert {key: said[key] for key in FACTS} == FACTS
    assert said["versions"]["torch"] == importlib.metadata.version("torch")
    assert torch.__version__.startswith(said["versions"]["torch"]), "+cu130 is not in every wheel's metadata"
    assert said["versions"]["python"] == platform.python_version()
    assert {"distft", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes"} <= set(said["versions"])
    assert said["host"] == socket.gethostname()
    assert said["slurm_job"] == "4711"
    assert said["started"].endswith("+00:00")
    assert said["git_commit"] is None or len(said["git_commit"]) == 40
    assert {path.name for path in folder.path.iterdir()} - {"uncommitted.diff"} == {"manifest.json", "recipe.toml"}


def test_what_was_changed_since_the_commit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the repository that the run is started in; gone again with the next start from a clean one."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("rate = 1\n")

    def git(*words: str) -> None:
        told = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        subprocess.run(told, check=True, capture_output=True)

    git("init", "-q")
    git("add", "train.py")
    git("commit", "-qm", "first")
    (project / "train.py").write_text("rate = 2\n")
    (project / "new.py").write_text("")
    monkeypatch.chdir(project)
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.start("", FACTS)
    said = json.loads((tmp_path / "run/manifest.json").read_text())
    diff = (tmp_path / "run/uncommitted.diff").read_text()
    assert "+rate = 2" in diff
    assert said["git"]["commit"] == said["git_commit"]
    assert (said["git"]["dirty"], said["git"]["untracked"]) == (True, ["new.py"])
    assert said["git"]["diff_sha256"] == hashlib.sha256(diff.encode()).hexdigest()
    git("commit", "-qam", "second")
    RunFolder(tmp_path / "run", writes=True).start("", FACTS)
    assert not (tmp_path / "run/uncommitted.diff").exists()
    assert json.loads((tmp_path / "run/manifest.json").read_text())["git"]["dirty"] is False


def test_one_rank_writes_it(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", writes=False).start("", FACTS)
    assert list((tmp_path / "run").iterdir()) == []
