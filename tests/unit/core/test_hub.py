"""One process for each cache folder asks the hub; the rest of a start waits for it, and may be asked to stop."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from distft.core import hub

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 100_000, "README.md": b"not asked for"}
SCRIPT = """
import sys
from distft.core import hub
folder = hub.snapshot("some/model", None, ["*.json", "*.safetensors"])
assert hub.snapshot("some/model", None, ["*.json", "*.safetensors"]) == folder, "a second time asks nobody"
print(folder, *sorted(path.name for path in folder.iterdir()))
"""


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with FakeHub(FILES) as made:
        yield made


def start(fake: FakeHub, home: Path, script: str = SCRIPT) -> subprocess.Popen[str]:
    told = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
    }
    told |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_CACHE": f"{home}/hub"}
    return subprocess.Popen([sys.executable, "-c", script], env=os.environ | told, stdout=subprocess.PIPE, text=True)


def ends(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def test_a_shared_cache_is_filled_once(fake: FakeHub, tmp_path: Path) -> None:
    said = ends([start(fake, tmp_path / "shared") for _ in range(5)])
    folder = f"{tmp_path}/shared/hub/models--some--model/snapshots/{COMMIT}"
    assert said == [[folder, "config.json", "model.safetensors"]] * 5
    assert fake.asked["model.safetensors"] == fake.asked["config.json"] == 1
    once = fake.asked["list"]
    ends([start(fake, tmp_path / "shared")])
    assert fake.asked["list"] > once, "a later start looks what `main` is by then"
    assert fake.asked["model.safetensors"] == 1
    assert fake.asked["README.md"] == 0


def test_each_node_fills_its_own(fake: FakeHub, tmp_path: Path) -> None:
    said = ends([start(fake, tmp_path / f"node{number % 2}") for number in range(4)])
    assert {folder.split("/hub/")[0] for folder, *_ in said} == {f"{tmp_path}/node0", f"{tmp_path}/node1"}
    assert fake.asked["model.safetensors"] == 2


def test_who_fails_leaves_it_to_the_next(tmp_path: Path) -> None:
    tried = []

    def fail() -> str:
        tried.append(1)
        raise OSError("no network")

    for _ in range(2):
        with pytest.raises(OSError, match="no network"):
            hub.once(tmp_path, "work", fail, good=lambda _: True, lasting=False)
    assert len(tried) == 2
    assert hub.once(tmp_path, "work", lambda: "done", good=lambda _: True, lasting=False) == "done"
    assert hub.once(tmp_path, "work", fail, good=lambda _: True, lasting=False) == "done"
    assert hub.once(tmp_path, "work", lambda: "again", good=lambda _: False, lasting=False) == "again"
    assert not list((tmp_path / ".distft").glob("*.tmp"))


def test_an_earlier_starts_word_counts_only_for_what_never_changes(tmp_path: Path) -> None:
    for lasting, gives in ((True, "old"), (False, "new")):
        name = f"work {lasting}"
        hub.once(tmp_path, name, lambda: "old", good=lambda _: True, lasting=lasting)
        for note in (tmp_path / ".distft").glob("*.json"):
            os.utime(note, (0, 0))
        assert hub.once(tmp_path, name, lambda: "new", good=lambda _: True, lasting=lasting) == gives


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    (tmp_path / ".distft").write_text("in the way")
    assert hub.once(tmp_path, "work", lambda: "found", good=lambda _: True, lasting=False) == "found"
