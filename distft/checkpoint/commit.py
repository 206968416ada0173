"""P4 to P9 of a save: all ranks agree, one rename makes it count, then hints and retention."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.checkpoint import durable
from distft.checkpoint.folders import Folders
from distft.checkpoint.manifest import Manifest
from distft.checkpoint.saving import Job, merge, write_manifest
from distft.core.errors import FileSystemError, explain
from distft.core.faults import Faults
from distft.core.files import sync_folder
from distft.core.ranks import RankErrors, Ranks, on_all_ranks

log = logging.getLogger(__name__)


class SaveFailed(FileSystemError):
    """A save that was given up by all ranks; the checkpoints before it are untouched and training may go on."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A committed checkpoint."""

    path: Path
    step: int
    num_bytes: int
    """Bytes of all files, all ranks; 0 when it was there already."""
    blocked_s: float
    """Seconds that training waited for it on this rank."""
    total_s: float
    """Seconds from the call to the commit."""
    warnings: tuple[str, ...] = ()
    """What went wrong after the commit (a hint file not renewed, a rank's error too late to matter)."""


class Committer:
    """Commits saves and remembers what retention must spare; all public methods are collective."""

    def __init__(self, folders: Folders, ranks: Ranks, faults: Faults, *, keep: int) -> None:
        self._folders, self._ranks, self._faults, self._keep = folders, ranks, faults, keep
        self._best_due: dict[str, Any] | None = None
        """A best.json that could not be written yet."""
        self._pruning: threading.Thread | None = None
        self.verified: int | None = None
        """The step that was last loaded, hence checked."""
        self.failures_in_a_row = 0

    def commit(self, job: Job, blocked_since: float) -> Saved | SaveFailed:
        """Turn the folder that all ranks wrote into a checkpoint, or give it up on all ranks.

        Args:
            job: this rank's share; waited for.
            blocked_since: when training began to wait for this call (monotonic seconds).
        """
        try:
            # A chunk of each tensor of each rank: a hundred megabytes of 512, and only rank 0 looks at them.
            written = on_all_ranks(self._ranks, lambda: (job.result(), self._inject("P4", job.step))[0], to_rank0=True)
        except RankErrors as error:
            return self.give_up(job.step, error)
        manifest: Manifest | None = None
        trouble = ""
        try:
            self._inject("P5", job.step)
            entries = merge(written) if self._ranks.rank == 0 else {}
            pending = write_manifest(job, written, entries) if self._ranks.rank == 0 else None
            self._inject("P6", job.step)
            if pending is not None:
                self._rename(job.step)
            manifest = pending
        except Exception as error:  # the other ranks are waiting to hear of it
            trouble = explain(job.disk_full() if durable.is_disk_full(error) else error)
        late = [trouble] if self._ranks.rank else []  # rank 0 alone decides from here on
        if manifest is not None or self._ranks.rank:
            late.append(self._afterwards("P7", job.step, lambda: self._renew_hints(job)))
        late.append(self._afterwards("P8", job.step, lambda: None))
        reports = self._ranks.gather((manifest.num_bytes if manifest else None, trouble, "; ".join(filter(None, late))))
        num_bytes, trouble, _ = reports[0]
        if num_bytes is None:
            return self.give_up(job.step, RankErrors({0: trouble}))
        self.failures_in_a_row = 0
        warnings = [f"rank {rank}: {text}" for rank, (*_, text) in enumerate(reports) if text]
        warnings += filter(None, [self._afterwards("P9", job.step, lambda: self._prune(job))])
        for text in warnings:
            log.warning("checkpoint of step %d is safe, but: %s", job.step, text)
        now = time.monotonic()
        return Saved(
            path=self._folders.step(job.step),
            step=job.step,
            num_bytes=num_bytes,
            blocked_s=job.blocked_s + now - blocked_since,
            total_s=now - job.started,
            warnings=tuple(warnings),
        )

    def give_up(self, step: int, error: RankErrors) -> SaveFailed:
        """Forget a save; no rank writes to it any more by now."""
        self.failures_in_a_row += 1
        if self._ranks.rank == 0:
            durable.remove_tree(self._folders.aside(step))
        self._ranks.barrier()
        failed = SaveFailed(f"step {step} was not saved: {error}; earlier checkpoints are untouched")
        log.warning("%s", failed)
        return failed

    def _inject(self, point: str, step: int) -> None:
        self._faults.inject(point, rank=self._ranks.rank, step=step)

    def _rename(self, step: int) -> None:
        """Commit by renaming; a checkpoint of another history under the same name waits until this one is in place."""
        home, old = self._folders.step(step), self._folders.replaced(step)
        if home.exists():
            home.rename(old)
        try:
            self._folders.aside(step).rename(home)
        except OSError:
            if old.exists():
                old.rename(home)
            raise

    def _renew_hints(self, job: Job) -> None:
        self._best_due = job.best or self._best_due
        if self._ranks.rank != 0:
            return
        sync_folder(self._folders.root)  # of P6; after the rename nothing may fail the save any more
        if self._best_due is not None:
            self._folders.write_best(self._best_due)
            self._best_due = None
        self._folders.point_to(job.step)

    def _afterwards(self, point: str, step: int, work: Callable[[], None]) -> str:
        """Do what cannot undo the commit any more; what went wrong, as text."""
        try:
            self._inject(point, step)
            work()
        except Exception as error:  # the checkpoint stands, and the other ranks are waiting
            return f"{point}: {explain(error)}"
        return ""

    def _prune(self, job: Job) -> None:
        if self._ranks.rank != 0:
            return
        protected = {self.verified, (self._best_due or {}).get("step")}
        doomed: list[Path] = []
        try:
            protected.add(self._folders.best_step())
        except ValueError as error:
            log.warning("best.json cannot be read (%s): no checkpoint is deleted until it is renewed", error)
        else:
            steps = self._folders.surplus(keep=self._keep, newest=job.step, protected=protected - {None})
            doomed = [self._folders.step(step) for step in steps]
        old = self._folders.replaced(job.step)
        trash = [self._folders.to_trash(path) for path in (*doomed, *([old] if old.exists() else []))]
        if job.thread is None:
            _remove_all(trash)
        elif trash:  # deleting many gigabytes on a network file system must not block training
            self.wait_for_pruning()
            self._pruning = threading.Thread(target=_remove_all, args=(trash,), name="checkpoint-prune", daemon=True)
            self._pruning.start()

    def wait_for_pruning(self) -> None:
        """Return once nothing is being deleted any more: a process that ends cuts its threads short."""
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        durable.remove_tree(path)
