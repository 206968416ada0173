"""Crafted and mutated checkpoints: refused, or read correctly; nothing of them ever runs."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_rank import OneRank

from distft.checkpoint.intervals import parse_index
from distft.checkpoint.manifest import FileEntry, Manifest, canonical, parse_manifest, read_manifest
from distft.checkpoint.reader import Reader
from distft.checkpoint.store import CheckpointStore
from distft.core.errors import CheckpointError

EXAMPLES = int(os.environ.get("DISTFT_FUZZ_EXAMPLES", "100"))
MUTATE = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    kit.filled(folder, 4)
    return folder / "step-00000004"


class Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.crater),)


def seal(step: Path) -> None:
    """Make the manifest fit whatever is in the folder: the attacker knows sha256 too."""
    old = read_manifest(step)
    files = []
    for name in sorted(os.listdir(step)):
        if name != "MANIFEST.json":
            data = (step / name).read_bytes()
            files.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest(step=old.step, world=old.world, engine=old.engine, hashes=old.hashes, files=tuple(files))
    (step / "MANIFEST.json").write_bytes(manifest.to_bytes())


@pytest.mark.row(37)
def test_a_malicious_pickle_never_runs(kit, tmp_path: Path) -> None:
    crater = tmp_path / "crater"
    kit.filled(tmp_path / "c", 2, 4)
    step = tmp_path / "c" / "step-00000004"
    bomb = pickle.dumps(Bomb(crater))
    (step / ".metadata").write_bytes(bomb)  # DCP itself would run it
    for name in ("state.json", "index.json"):
        original = (step / name).read_bytes()
        (step / name).write_bytes(bomb)
        seal(step)
        with pytest.raises(CheckpointError, match="not JSON"):
            CheckpointStore(tmp_path / "c", OneRank()).load(step)
        (step / name).write_bytes(original)
    seal(step)
    assert kit.same(CheckpointStore(tmp_path / "c", OneRank()).load(step), 4)
    assert not crater.exists()


@pytest.mark.row(37)
def test_a_malicious_tensor_never_runs(kit, tmp_path: Path) -> None:
    crater = tmp_path / "crater"
    kit.filled(tmp_path / "c", 4, world=1)
    step = tmp_path / "c" / "step-00000004"
    shard = step / "__0_0.distcp"
    for payload in (
        lambda path: torch.save(Bomb(crater), path),
        lambda path: path.write_bytes(pickle.dumps(Bomb(crater))),
    ):
        payload(shard)
        index = json.loads((step / "index.json").read_bytes())
        for entry in index["tensors"].values():
            for chunk in entry["chunks"]:
                chunk[3:] = [0, shard.stat().st_size]
        (step / "index.json").write_bytes(canonical(index))
        seal(step)
        reader = CheckpointStore(tmp_path / "c", OneRank()).load(step).reader
        with pytest.raises(CheckpointError, match="not a tensor"):
            reader.read("param/a.weight")
    assert not crater.exists()


def test_another_tensor_in_the_place_is_refused(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 4, world=1)
    step = tmp_path / "step-00000004"
    index = json.loads((step / "index.json").read_bytes())
    tensors = index["tensors"]
    tensors["param/a.weight"]["chunks"][0][2:] = tensors["exp_avg/a.weight"]["chunks"][0][2:]
    (step / "index.json").write_bytes(canonical(index))
    seal(step)
    loaded = CheckpointStore(tmp_path, OneRank()).load_newest()
    assert loaded is not None
    with pytest.raises(CheckpointError, match=r"holds .* torch.bfloat16, the index says"):
        loaded.reader.read("param/a.weight")


@pytest.mark.row(38)
@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\x00b", "MANIFEST.json"])
def test_escaping_paths_are_refused(path: str) -> None:
    manifest = Manifest(step=1, world=1, engine="solo", hashes={}, files=(FileEntry(path, 1, "0" * 64),))
    with pytest.raises(CheckpointError, match="refuses the path"):
        parse_manifest(manifest.to_bytes())
    index = {"schema": 1, "tensors": {"w": {"numel": 1, "dtype": "float32", "chunks": [[0, 1, path, 0, 1]]}}}
    with pytest.raises(CheckpointError, match="bad chunk"):
        parse_index(canonical(index), {"__0_0.distcp": 10})


@pytest.mark.row(38)
def test_a_linked_checkpoint_is_refused(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path / "c", 2, 4)
    (tmp_path / "c" / "step-00000004").rename(tmp_path / "elsewhere")
    (tmp_path / "c" / "step-00000004").symlink_to(tmp_path / "elsewhere")
    loaded = kit.newest(tmp_path / "c")
    assert loaded.step == 2
    assert "is a link" in loaded.rejected[0]
    assert "WHY.txt" not in os.listdir(tmp_path / "elsewhere")


def test_a_pipe_does_not_hang_us(kit, tmp_path: Path) -> None:
    kit.filled(tmp_path, 2, 4)
    (tmp_path / "step-00000004" / "MANIFEST.json").unlink()
    os.mkfifo(tmp_path / "step-00000004" / "MANIFEST.json")
    assert kit.newest(tmp_path).step == 2


def mutated(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, drop, insert in edits:
        at %= len(data) + 1
        data = data[:at] + insert + data[at + drop :]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=8)), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [trail] * bool(trail) + [place for key, inner in items for place in places(inner, (*trail, key))]


def with_one_changed(document: Any, data: st.DataObject) -> Any:
    """A JSON document with the value at a random place replaced."""
    trail = data.draw(st.sampled_from(places(document)))
    target = document
    for key in trail[:-1]:
        target = target[key]
    target[trail[-1]] = data.draw(VALUES)
    return document


@MUTATE
@given(edits=EDITS)
def test_mutated_manifest_bytes(good: Path, edits: list[tuple[int, int, bytes]]) -> None:
    data = (good / "MANIFEST.json").read_bytes()
    try:
        manifest = parse_manifest(mutated(data, edits))
    except CheckpointError:
        return
    assert manifest == parse_manifest(data)


@MUTATE
@given(data=st.data())
def test_mutated_manifest_values(good: Path, data: st.DataObject) -> None:
    """Re-sealed, as an attacker would: it parses to what it says, or is refused."""
    body = with_one_changed(json.loads((good / "MANIFEST.json").read_bytes()), data)
    body.pop("sha256", None)
    sealed = canonical(body | {"sha256": hashlib.sha256(canonical(body)).hexdigest()})
    try:
        manifest = parse_manifest(sealed)
    except CheckpointError:
        return
    assert manifest.to_bytes() == sealed
    assert all("/" not in file.path and file.path not in ("..", ".") for file in manifest.files)


@MUTATE
@given(edits=EDITS)
def test_mutated_index_bytes(kit, good: Path, edits: list[tuple[int, int, bytes]]) -> None:
    check_index(kit, good, mutated((good / "index.json").read_bytes(), edits))


@MUTATE
@given(data=st.data())
def test_mutated_index_values(kit, good: Path, data: st.DataObject) -> None:
    check_index(kit, good, canonical(with_one_changed(json.loads((good / "index.json").read_bytes()), data)))


def check_index(kit, good: Path, text: bytes) -> None:
    """The reader either refuses or returns intervals of what was saved, under the names that were saved."""
    want = kit.tensors(4)
    try:
        entries = parse_index(text, read_manifest(good).file_bytes)
        reader = Reader(good, entries)
        got = {name: reader.read(name) for name in reader}
    except CheckpointError:
        return
    for name in got.keys() & want.keys():
        assert torch.equal(got[name], want[name][: got[name].numel()])


@MUTATE
@given(edits=EDITS)
def test_mutated_shards(good: Path, tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    """Even when the sha256 has been made to fit, a shard gives tensors of the right shape or a CheckpointError."""
    entries = parse_index((good / "index.json").read_bytes(), read_manifest(good).file_bytes)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (tmp_path / name).write_bytes(mutated((good / name).read_bytes(), edits))
    reader = Reader(tmp_path, entries)
    for name in reader:
        try:
            assert reader.read(name).numel() == reader.numel(name)
        except CheckpointError:
            continue
