"""MANIFEST.json: which files make up a checkpoint and what they must hash to. Nothing is read before it has passed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.checkpoint.durable import read_regular, sha256_of
from distft.core.errors import CheckpointError, explain

MANIFEST = "MANIFEST.json"
SCHEMA = 1
LIMIT_BYTES = 256 * 2**20
"""Largest size of any JSON file of a checkpoint: an index of a million chunks needs about 100 MB."""
KEYS = {"schema", "step", "world", "engine", "hashes", "files", "sha256"}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file as it was written."""

    path: str
    """Name inside the checkpoint's folder; never a path."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    """Optimizer steps taken."""
    world: int
    """Ranks that wrote it."""
    engine: str
    hashes: Mapping[str, str]
    """What must fit for a resume: recipe, dataset, base model, ... by name."""
    files: tuple[FileEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def file_bytes(self) -> dict[str, int]:
        """Name -> length."""
        return {file.path: file.bytes for file in self.files}

    def to_bytes(self) -> bytes:
        """Return the file: canonical JSON with its own sha256, so that a flipped bit in it is noticed as well."""
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "step": self.step,
            "world": self.world,
            "engine": self.engine,
            "hashes": dict(self.hashes),
            "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
        }
        return canonical(body | {"sha256": hashlib.sha256(canonical(body)).hexdigest()})


def canonical(value: Any) -> bytes:
    """Write a JSON value in the one form of this room: sorted keys, two spaces, newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii")


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{name}: not JSON ({str(error)[:120]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: not a JSON object")
    return value


def is_plain_name(name: str) -> bool:
    """Return whether a name is a file directly inside the folder: no separators, no dot-dot, no odd characters."""
    return _NAME.fullmatch(name) is not None and name not in (".", "..")


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: it is anything but what `Manifest.to_bytes` writes.
    """
    raw = parse_json(data, MANIFEST)
    if raw.get("schema") != SCHEMA or isinstance(raw.get("schema"), bool):
        raise CheckpointError(f"{MANIFEST}: schema {str(raw.get('schema'))[:20]}, this version reads {SCHEMA}")
    if set(raw) != KEYS:
        raise CheckpointError(f"{MANIFEST}: unexpected or missing keys: {', '.join(sorted(set(raw) ^ KEYS))[:200]}")
    if not _is_count(raw["step"]) or not _is_count(raw["world"]) or raw["world"] == 0:
        raise CheckpointError(f"{MANIFEST}: step and world must be counts")
    if not isinstance(raw["engine"], str) or not _is_table_of_text(raw["hashes"]):
        raise CheckpointError(f"{MANIFEST}: engine and hashes must be text")
    if not isinstance(raw["files"], list):
        raise CheckpointError(f"{MANIFEST}: files is not a list")
    files = tuple(_parse_file(entry) for entry in raw["files"])
    if len({file.path for file in files}) != len(files):
        raise CheckpointError(f"{MANIFEST}: a file is listed twice")
    manifest = Manifest(
        step=raw["step"], world=raw["world"], engine=raw["engine"], hashes=dict(raw["hashes"]), files=files
    )
    try:
        same = manifest.to_bytes() == data
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise CheckpointError(f"{MANIFEST}: damaged (its own sha256 does not match)")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint's folder.

    Raises:
        CheckpointError: missing, unreadable, damaged, or the folder is a link.
    """
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise CheckpointError(f"{folder.name} is a link or a file, not a folder")
        data = read_regular(folder / MANIFEST, limit=LIMIT_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: {explain(error)}") from error
    return parse_manifest(data)


def entry_of(path: Path) -> FileEntry:
    """Return the length and sha256 of a file just written."""
    return FileEntry(path.name, path.stat().st_size, sha256_of(path))


def share_of(manifest: Manifest, rank: int, world: int) -> list[FileEntry]:
    """Return the files that one rank checks: largest first, each to the rank with the fewest bytes so far."""
    shares: list[list[FileEntry]] = [[] for _ in range(world)]
    loads = [0] * world
    for file in sorted(manifest.files, key=lambda file: (-file.bytes, file.path)):
        lightest = loads.index(min(loads))
        shares[lightest].append(file)
        loads[lightest] += file.bytes + 1  # + 1: empty files are spread too
    return shares[rank]


def faults_of(folder: Path, files: list[FileEntry]) -> list[str]:
    """Return what is wrong with these files, one reason per bad file; nothing when all are as they were written."""
    return [reason for file in files if (reason := _fault_of(folder / file.path, file))]


def read_verified(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return a small file, hashed from the very bytes that are returned.

    Raises:
        CheckpointError: not in the manifest, unreadable or changed.
    """
    entry = next((file for file in manifest.files if file.path == name), None)
    if entry is None:
        raise CheckpointError(f"{name}: not listed in {MANIFEST}")
    try:
        data = read_regular(folder / name, limit=LIMIT_BYTES)
    except OSError as error:
        raise CheckpointError(f"{name}: {explain(error)}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{name}: sha256 does not match")
    return data


def _fault_of(path: Path, file: FileEntry) -> str | None:
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return f"{file.path}: a link or not a regular file"
        if status.st_size != file.bytes:
            return f"{file.path}: {status.st_size} bytes instead of {file.bytes}"
        if sha256_of(path) != file.sha256:
            return f"{file.path}: sha256 does not match"
    except FileNotFoundError:
        return f"{file.path}: missing"
    except OSError as error:
        return f"{file.path}: {explain(error)}"
    return None


def _parse_file(raw: Any) -> FileEntry:
    if not isinstance(raw, dict) or set(raw) != {"path", "bytes", "sha256"}:
        raise CheckpointError(f"{MANIFEST}: not a file entry: {str(raw)[:80]}")
    path, num_bytes, digest = raw["path"], raw["bytes"], raw["sha256"]
    if not isinstance(path, str) or not is_plain_name(path) or path == MANIFEST:
        raise CheckpointError(f"{MANIFEST}: refuses the path {str(path)[:80]!r}: only names inside the folder")
    if not _is_count(num_bytes) or not isinstance(digest, str) or _HEX.fullmatch(digest) is None:
        raise CheckpointError(f"{MANIFEST}: bad size or sha256 of {path}")
    return FileEntry(path, num_bytes, digest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_table_of_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
