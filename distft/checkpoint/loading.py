"""Find the newest checkpoint that can be trusted, with all ranks of one mind; every function here is collective."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from distft.checkpoint.durable import read_regular
from distft.checkpoint.folders import Folders
from distft.checkpoint.intervals import INDEX, parse_index
from distft.checkpoint.manifest import (
    Manifest,
    faults_of,
    parse_json,
    parse_manifest,
    read_manifest,
    read_verified,
    share_of,
)
from distft.checkpoint.reader import Reader
from distft.core.errors import CheckpointError, explain
from distft.core.ranks import RankErrors, Ranks, on_all_ranks

T = TypeVar("T")
log = logging.getLogger(__name__)

STATE = "state.json"
SHARED_TRIES = 20
SHARED_WAIT_S = 0.25
NOT_SHARED = "output_dir is not shared: every rank must see the same folder (a network file system, or one machine)"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint whose every byte has been checked."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    """What rank 0 handed to the save."""
    reader: Reader
    rejected: tuple[str, ...] = ()
    """Newer checkpoints that were found bad, each with its reason."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest.step


def check_shared(root: Path, ranks: Ranks) -> None:
    """Have every rank read a file that rank 0 makes.

    Raises:
        CheckpointError: some rank does not see it.
        RankErrors: rank 0 cannot write here.
    """
    token = on_all_ranks(ranks, lambda: _write_probe(root) if ranks.rank == 0 else "")[0]
    probe, seen = root / token, False
    for attempt in range(SHARED_TRIES):  # a network file system may need a moment
        seen = _sees(probe)
        if seen or attempt == SHARED_TRIES - 1:
            break
        time.sleep(SHARED_WAIT_S)
    blind = [rank for rank, saw in enumerate(ranks.gather(seen)) if not saw]
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
    if blind:
        raise CheckpointError(f"{NOT_SHARED}; rank {', '.join(map(str, blind))} does not see rank 0's {root}")


def load_newest(folders: Folders, ranks: Ranks) -> Loaded | None:
    """See `CheckpointStore.load_newest`."""
    steps = _same_listing(folders, ranks)
    rejected: list[str] = []
    earlier = ranks.gather([f"{path.name}: {folders.why(path)}" for path in folders.quarantined()])[0]
    for step in steps:
        loaded, reasons = examine(folders.step(step), ranks, expected_step=step)
        if loaded is not None:
            return replace(loaded, rejected=tuple(rejected))
        home = _quarantine(folders, ranks, step, reasons)
        rejected.append(f"{folders.step(step).name}: {'; '.join(reasons)}{home}")
        log.warning("checkpoint %s", rejected[-1])
    if rejected or earlier:
        listed = "\n".join(f"  {line}" for line in [*rejected, *earlier])
        raise CheckpointError(
            f"{folders.root}: no valid checkpoint among {len(rejected) + len(earlier)}:\n{listed}\n"
            "  to start anew, choose another output folder or move these away"
        )
    return None


def load_path(path: Path, ranks: Ranks) -> Loaded:
    """See `CheckpointStore.load`."""
    loaded, reasons = examine(path, ranks, expected_step=None)
    if loaded is None:
        raise CheckpointError(f"{path}: not a valid checkpoint: {'; '.join(reasons)}")
    return loaded


def examine(path: Path, ranks: Ranks, *, expected_step: int | None) -> tuple[Loaded | None, list[str]]:
    """Check every byte of one checkpoint, the ranks sharing the hashing, then open it.

    Returns:
        The checkpoint and no reason, or None and what is wrong; equal on all ranks.
    """
    manifest, reasons = _agreed(ranks, lambda: _manifest(path, expected_step))
    if not reasons and manifest is not None:
        read = hashlib.sha256(manifest.to_bytes()).hexdigest()
        results = ranks.gather((faults_of(path, share_of(manifest, ranks.rank, ranks.world)), read))
        reasons = sorted({reason for faults, _ in results for reason in faults})
        if len({read for _, read in results}) > 1:  # then some file may have been nobody's share
            reasons.append("ranks read different manifests")
    if reasons or manifest is None:
        return None, reasons
    loaded, reasons = _agreed(ranks, lambda: _open(path, manifest))
    return (None, reasons) if reasons else (loaded, [])


def _manifest(path: Path, expected_step: int | None) -> Manifest:
    manifest = read_manifest(path)
    if expected_step not in (None, manifest.step):
        raise CheckpointError(f"MANIFEST.json is of step {manifest.step}")
    return manifest


def _open(path: Path, manifest: Manifest) -> Loaded:
    entries = parse_index(read_verified(path, manifest, INDEX), manifest.file_bytes)
    return Loaded(
        path=path,
        manifest=manifest,
        state=parse_json(read_verified(path, manifest, STATE), STATE),
        reader=Reader(path, entries),
    )


def _agreed(ranks: Ranks, work: Callable[[], T]) -> tuple[T | None, list[str]]:
    """Return this rank's result, and the reasons why some rank has none."""
    mine: T | None = None
    reason = ""
    try:
        mine = work()
    except CheckpointError as error:
        reason = str(error)
    except (OSError, MemoryError) as error:
        reason = explain(error)
    return mine, sorted({text for text in ranks.gather(reason) if text})


def _write_probe(root: Path) -> str:
    name = f".probe-{uuid.uuid4().hex}"
    (root / name).write_text("", encoding="utf-8")
    return name


def _sees(probe: Path) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(probe.parent.parent)  # makes NFS forget that it once did not find these names
        os.listdir(probe.parent)
    return probe.exists()


def _same_listing(folders: Folders, ranks: Ranks) -> list[int]:
    listings: list[list[int]] = []
    for attempt in range(SHARED_TRIES):
        listings = ranks.gather(folders.steps())
        if all(listing == listings[0] for listing in listings):
            return listings[0]
        if attempt < SHARED_TRIES - 1:
            time.sleep(SHARED_WAIT_S)  # a network file system may be behind
    odd = next(rank for rank, listing in enumerate(listings) if listing != listings[0])
    raise CheckpointError(
        f"{NOT_SHARED}; rank 0 sees steps {listings[0]}, rank {odd} {listings[odd]} in {folders.root}"
    )


def _quarantine(folders: Folders, ranks: Ranks, step: int, reasons: list[str]) -> str:
    try:
        homes = on_all_ranks(ranks, lambda: folders.quarantine(step, reasons).name if ranks.rank == 0 else "")
    except RankErrors as error:
        return f" (cannot be renamed: {error})"
    return f" (kept as {homes[0]})"


def num_bytes_of(path: Path) -> int:
    """Return what the manifest of a checkpoint adds up to; 0 when it cannot be read. Not collective."""
    try:
        return parse_manifest(read_regular(path / "MANIFEST.json", limit=256 * 2**20)).num_bytes
    except (OSError, CheckpointError):
        return 0
