"""One save on one rank: its files written, synced and hashed (P2, P3), in the caller's thread or in one of its own."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.checkpoint import durable
from distft.checkpoint.intervals import INDEX, Piece, TensorEntry, index_bytes, tensor_entries
from distft.checkpoint.manifest import MANIFEST, FileEntry, Manifest, entry_of
from distft.checkpoint.shards import DCP_CHUNKS, DCP_METADATA, Part, write_dcp_metadata, write_pieces
from distft.core.faults import Faults
from distft.core.files import sync_file, sync_folder, write_file

MARGIN = 1.2


@dataclass(frozen=True)
class WrittenFiles:
    """What one rank put into the folder."""

    files: list[FileEntry]
    parts: list[Part]


@dataclass(kw_only=True)
class Job:
    """One rank's share of one save."""

    folder: Path
    step: int
    rank: int
    world: int
    engine: str
    hashes: Mapping[str, str]
    pieces: list[Piece]
    texts: dict[str, bytes]
    """Small files by name, fixed when the save began: the caller's dictionaries go on changing."""
    best: dict[str, Any] | None
    need_bytes: int
    faults: Faults
    started: float = field(default_factory=time.monotonic)
    blocked_s: float = 0.0
    """Seconds that training has waited so far."""
    write_s: float = 0.0
    thread: threading.Thread | None = None
    written: WrittenFiles | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Write in a thread of its own; the group is never used there."""
        self.thread = threading.Thread(target=self.run, name=f"checkpoint-{self.step}", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Write, sync, hash; the outcome is kept for `result`, whatever it is, because ranks decide together."""
        began = time.monotonic()
        try:
            self.written = self._write()
        except BaseException as error:  # shown by result() in the thread that trains
            self.error = error
        self.pieces = []
        self.write_s = time.monotonic() - began
        self.done.set()

    def result(self) -> WrittenFiles:
        """Wait for the thread and return what was written.

        Raises:
            OSError: "disk full: need X, have Y", or whatever stopped the writing.
        """
        self.done.wait()
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            if durable.is_disk_full(self.error):
                raise self.disk_full() from self.error
            raise self.error
        assert self.written is not None
        return self.written

    def disk_full(self) -> OSError:
        """Return the error that names both numbers."""
        return disk_full(self.folder.parent, self.need_bytes)

    def _write(self) -> WrittenFiles:
        for name, text in self.texts.items():
            (self.folder / name).write_bytes(text)
        where = {"rank": self.rank, "step": self.step}
        parts = write_pieces(
            self.folder, self.pieces, rank=self.rank, halfway=lambda: self.faults.inject("P2", **where)
        )
        self.faults.inject("P3", **where)
        names = sorted({chunk.file for *_, chunk in parts if chunk is not None} | set(self.texts))
        for name in names:
            sync_file(self.folder / name)
        return WrittenFiles([entry_of(self.folder / name) for name in names], parts)


def check_space(root: Path, need_bytes: int) -> None:
    """Raise OSError "disk full: need X, have Y" unless that much is free."""
    if shutil.disk_usage(root).free < need_bytes:
        raise disk_full(root, need_bytes)


def disk_full(root: Path, need_bytes: int) -> OSError:
    """Return the error that names both numbers."""
    need, have = durable.size_text(need_bytes), durable.size_text(shutil.disk_usage(root).free)
    return OSError(errno.ENOSPC, f"disk full: need {need}, have {have}")


def merge(written: list[WrittenFiles]) -> dict[str, TensorEntry]:
    """Return all ranks' chunks as whole tensors.

    Raises:
        PieceError: gaps, overlaps, disagreement.
    """
    return tensor_entries(part for one_rank in written for part in one_rank.parts)


def write_manifest(job: Job, written: list[WrittenFiles], entries: Mapping[str, TensorEntry]) -> Manifest:
    """Write index, DCP's metadata and the manifest on rank 0 (P5); after this only the folder's name is missing."""
    write_file(job.folder / INDEX, index_bytes(entries), durable=True)
    index_files = [entry_of(job.folder / INDEX)]
    if sum(len(entry.chunks) for entry in entries.values()) <= DCP_CHUNKS:
        write_dcp_metadata(job.folder, entries)
        index_files.append(entry_of(job.folder / DCP_METADATA))
    files = sorted(
        [*index_files, *(file for one_rank in written for file in one_rank.files)], key=lambda file: file.path
    )
    manifest = Manifest(step=job.step, world=job.world, engine=job.engine, hashes=dict(job.hashes), files=tuple(files))
    write_file(job.folder / MANIFEST, manifest.to_bytes(), durable=True)
    sync_folder(job.folder)
    return manifest
