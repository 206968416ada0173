"""Starts that cannot work are refused with their own exit code, and leave other runs alone."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest
from harness import Bench, run

from distft.checkpoint.lock import RunLock


def plain(bench: Bench, name: str, *more: str, **env: str):
    """One process, no launcher."""
    return run([sys.executable, "-m", "distft.train", str(bench.recipe), "--set", f'name="{name}"', *more], **env)


@pytest.mark.row(30)
def test_a_folder_in_use_is_refused(bench: Bench) -> None:
    folder = bench.folder / "runs/busy"
    folder.mkdir(parents=True)
    with RunLock(folder, job="4711"):
        done = plain(bench, "busy")
    assert done.returncode == 7
    assert f"host {os.uname().nodename}, process {os.getpid()}, job 4711" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "exit.json").exists(), "the other run's folder is left alone"


@pytest.mark.row(31)
def test_an_output_folder_that_cannot_be_written_is_refused_before_any_import(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    done = plain(bench, "nowhere", "--output-dir", str(tmp_path / "file"))
    took = time.monotonic() - began
    assert done.returncode == 8
    assert "cannot be written (Not a directory); choose another output_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert took < 10, "two seconds on an idle machine, most of them Python's own start"


@pytest.mark.row(40)
def test_a_port_in_use_is_named(bench: Bench) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        done = plain(bench, "port", **place)
    assert done.returncode == 9
    assert f"rank 0 of 2 could not join the process group at localhost:{port}: " in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.row(35)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_token_without_a_row_in_the_embedding_is_refused(bench: Bench, tiny_config: Path, method: str) -> None:
    """The tokenizer of the bench has 1,024 tokens, this model 256."""
    model = ["--set", f'model.path="{tiny_config}"', "--set", f'model.tokenizer="{bench.folder}/model"']
    done = plain(bench, "small", *model, "--set", 'model.init="random"', "--set", f'method.name="{method}"')
    assert done.returncode == 2
    assert "the embedding has 256 rows  use the tokenizer that belongs to the model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bench.folder / "runs/small/metrics.jsonl").exists()
