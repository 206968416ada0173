"""A run's checkpoints: written aside, committed by one rename, checked before use, never lost.

Methods marked collective are called by all ranks in the same order, at optimizer-step boundaries.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.checkpoint import durable
from distft.checkpoint.commit import Committer, Saved, SaveFailed
from distft.checkpoint.folders import Folders
from distft.checkpoint.intervals import Piece
from distft.checkpoint.loading import STATE, Loaded, check_shared, load_newest, load_path, num_bytes_of
from distft.checkpoint.manifest import canonical
from distft.checkpoint.saving import MARGIN, Job, check_space
from distft.checkpoint.staging import StagingBuffer
from distft.core.errors import CheckpointError, FileSystemError
from distft.core.faults import Faults, FromEnvironment
from distft.core.ranks import RankErrors, Ranks, on_all_ranks


class CheckpointStore:
    """The checkpoints folder of one run."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int = 2,
        engine: str = "",
        hashes: Mapping[str, str] | None = None,
        faults: Faults | None = None,
    ) -> None:
        """Make the folder, see that it is shared, and remove what dead runs left half done; collective.

        Args:
            folder: below the run's folder, whose lock the run holds.
            ranks: all of them.
            keep: newest checkpoints to keep, at least 2: one may turn out bad.
            engine: name for the manifest.
            hashes: what must fit for a resume (recipe, data, base model) by name, for the manifest.
            faults: what to tell where we are; None: DISTFT_FAULT.

        Raises:
            FileSystemError: the folder cannot be made or written.
            CheckpointError: ranks see different folders.
        """
        assert keep >= 2, "a single checkpoint is no safety"
        self.folder, self._ranks, self._keep = folder, ranks, keep
        self._engine, self._hashes = engine, dict(hashes or {})
        self._faults = faults or FromEnvironment()
        self._folders = Folders(folder)
        self._stage = StagingBuffer()
        self._job: Job | None = None
        self._outcomes: deque[Saved | SaveFailed] = deque()
        self._ours: set[int] = set()
        """Steps written or loaded by this process: the history it is on."""
        self._committer = Committer(self._folders, ranks, self._faults, keep=keep)
        try:
            on_all_ranks(ranks, self._on_first(lambda: folder.mkdir(parents=True, exist_ok=True)))
            check_shared(folder, ranks)
            on_all_ranks(ranks, self._on_first(self._folders.clean))
        except RankErrors as error:
            raise FileSystemError(f"{folder}: cannot be written ({error}); choose another output_dir") from error

    def save(
        self,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        *,
        step: int,
        best: dict[str, Any] | None = None,
    ) -> Saved:
        """Write and commit a checkpoint; collective. Waits for one in flight first.

        Args:
            pieces: what this rank holds; together they tile every tensor.
            state: JSON, equal on all ranks (rank 0's is written).
            step: optimizer steps taken.
            best: {"step": N, ...}: the best checkpoint from now on, None leaves it as it is.

        Raises:
            SaveFailed: given up on all ranks; nothing of it is left, everything before it is.
        """
        began = time.monotonic()
        self._settle()
        job = self._begin(list(pieces), state, step, best)
        if job is None:
            return self._already(step, best, began)
        job.run()
        outcome = self._committer.commit(job, began)
        if isinstance(outcome, SaveFailed):
            raise outcome
        self._ours.add(step)
        return outcome

    def save_async(
        self,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        *,
        step: int,
        best: dict[str, Any] | None = None,
    ) -> float:
        """Copy the state aside and write it in the background; collective. Waits for one in flight first.

        `poll` or `finish` commits it. Arguments: see `save`.

        Returns:
            Seconds that training was blocked.

        Raises:
            SaveFailed: it could not even begin (disk full).
        """
        began = time.monotonic()
        self._settle()
        job = self._begin([], state, step, best, num_bytes=sum(piece.num_bytes for piece in pieces))
        if job is None:
            self._outcomes.append(self._already(step, best, began))
            return time.monotonic() - began
        try:
            job.pieces = self._stage.take(pieces)
        except Exception as error:  # out of host memory, or a piece that does not fit: told at the commit, to all ranks
            job.error = error
            job.done.set()
        else:
            job.start()
        job.blocked_s = time.monotonic() - began
        self._job = job
        return job.blocked_s

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Take the host memory of asynchronous saves now: the first one would otherwise pay for it. Not collective."""
        if self._job is None:
            self._stage.take(pieces)

    @property
    def failures_in_a_row(self) -> int:
        """Saves given up since the last good one; equal on all ranks."""
        return self._committer.failures_in_a_row

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written in the background."""
        return self._job is not None

    def poll(self) -> Saved | None:
        """Commit the save in flight if all ranks have written theirs; collective, cheap, at every step boundary.

        Returns:
            The save that was committed since the last call, None if none was.

        Raises:
            SaveFailed: it was given up instead.
        """
        if self._job is not None and self._ranks.all_true(self._job.done.is_set()):
            self._settle()
        outcome = self._outcomes.popleft() if self._outcomes else None
        if isinstance(outcome, SaveFailed):
            raise outcome
        return outcome

    def finish(self) -> Saved | None:
        """Wait for the save in flight and commit it; collective, before the run ends.

        Returns:
            The last save that no `poll` has reported, None if there is none.

        Raises:
            SaveFailed: that one was given up.
        """
        self._settle()
        self._committer.wait_for_pruning()
        outcome = self._outcomes.pop() if self._outcomes else None
        self._outcomes.clear()
        if isinstance(outcome, SaveFailed):
            raise outcome
        return outcome

    def load_newest(self) -> Loaded | None:
        """Load the newest checkpoint that passes every check; collective. Bad ones are renamed, never deleted.

        Returns:
            None when the folder has never held a checkpoint.

        Raises:
            CheckpointError: there are some and none is valid (each is listed with its reason), or ranks see
                different folders.
        """
        return self._remember(load_newest(self._folders, self._ranks))

    def load(self, path: Path) -> Loaded:
        """Load one checkpoint by its folder, anywhere; collective. It is left as it is, good or bad.

        Raises:
            CheckpointError: it is not valid; the message lists what is wrong.
        """
        loaded = load_path(path, self._ranks)
        self._remember(loaded if path.parent.resolve() == self.folder.resolve() else None)
        return loaded

    def load_best(self) -> Loaded | None:
        """Load the checkpoint that best.json names; collective. None when none was ever the best.

        Raises:
            CheckpointError: it is not valid, or best.json is not.
        """
        try:
            step = self._folders.best_step()
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: best.json cannot be read: {error}") from None
        return None if step is None else self.load(self._folders.step(step))

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, unchecked, newest first."""
        return self._folders.steps()

    def mark_best(self, best: dict[str, Any]) -> None:
        """Write best.json; collective. For an evaluation after the checkpoint of its step was committed.

        Args:
            best: {"step": N, ...}; retention spares the checkpoint of that step.

        Raises:
            SaveFailed: it cannot be written.
        """
        try:
            on_all_ranks(self._ranks, self._on_first(lambda: self._folders.write_best(best)))
        except RankErrors as error:
            raise SaveFailed(f"{self.folder}: best.json cannot be written: {error}") from error

    def set_aside_after(self, step: int) -> list[str]:
        """Rename checkpoints newer than `step`, so that no resume takes them up again after a rollback; collective.

        Returns:
            Their new names.

        Raises:
            SaveFailed: a rename failed.
        """
        self._settle()
        later = [newer for newer in self._folders.steps() if newer > step]
        try:
            names = on_all_ranks(
                self._ranks, self._on_first(lambda: [self._folders.set_aside(newer).name for newer in later])
            )
        except RankErrors as error:
            raise SaveFailed(f"{self.folder}: cannot set later checkpoints aside: {error}") from error
        self._ours -= set(later)
        return names[0] or []

    def _remember(self, loaded: Loaded | None) -> Loaded | None:
        if loaded is not None:
            self._committer.verified = loaded.step
            self._ours.add(loaded.step)
        return loaded

    def _on_first(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work if self._ranks.rank == 0 else lambda: None

    def _inject(self, point: str, step: int) -> None:
        self._faults.inject(point, rank=self._ranks.rank, step=step)

    def _begin(
        self,
        pieces: list[Piece],
        state: dict[str, Any],
        step: int,
        best: dict[str, Any] | None,
        *,
        num_bytes: int | None = None,
    ) -> Job | None:
        """Run P0 and P1; None when this very step has been saved already."""
        mine = sum(piece.num_bytes for piece in pieces) if num_bytes is None else num_bytes
        texts: dict[str, bytes] = {}

        def agree_to_save() -> tuple[int, int, bool]:
            self._inject("P0", step)
            texts.update({STATE: canonical(state)} if self._ranks.rank == 0 else {})
            return step, mine, step in self._ours and self._folders.step(step).exists()

        try:
            reports = on_all_ranks(self._ranks, agree_to_save)
            if len({at_step for at_step, *_ in reports}) > 1:
                raise RankErrors(dict(enumerate(f"is at step {at_step}" for at_step, *_ in reports)))
            if reports[0][2]:
                return None
            need = on_all_ranks(self._ranks, lambda: self._prepare(step, sum(size for _, size, _ in reports)))[0]
        except RankErrors as error:
            raise self._committer.give_up(step, error) from error
        return Job(
            folder=self._folders.aside(step),
            step=step,
            rank=self._ranks.rank,
            world=self._ranks.world,
            engine=self._engine,
            hashes=self._hashes,
            pieces=pieces,
            texts=texts,
            best=best,
            need_bytes=need or 0,
            faults=self._faults,
        )

    def _prepare(self, step: int, num_bytes: int) -> int | None:
        self._inject("P1", step)
        if self._ranks.rank != 0:
            return None
        kept_steps = self._folders.steps()
        need = int(MARGIN * max(num_bytes, num_bytes_of(self._folders.step(kept_steps[0])) if kept_steps else 0))
        check_space(self.folder, need)
        aside = self._folders.aside(step)
        if aside.exists():
            durable.remove_tree(aside)
        aside.mkdir()
        return need

    def _settle(self) -> None:
        """Commit what is in flight, waiting for it."""
        if self._job is not None:
            job, self._job = self._job, None
            outcome = self._committer.commit(job, time.monotonic())
            if isinstance(outcome, Saved):
                self._ours.add(outcome.step)
            self._outcomes.append(outcome)

    def _already(self, step: int, best: dict[str, Any] | None, began: float) -> Saved:
        if best is not None:
            self.mark_best(best)
        spent = time.monotonic() - began
        return Saved(path=self._folders.step(step), step=step, num_bytes=0, blocked_s=spent, total_s=spent)
