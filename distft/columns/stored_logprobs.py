"""Log-probabilities of prepared rows under the model as it is before training, computed once and kept in a file.

The pass runs under the run's own engine, type, kernels and packing. Its progress is kept too: a run that is broken off
in it goes on where it was, and later runs over the same rows and weights find it done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.core.errors import FileSystemError, MachineError, Preempted
from distft.core.phase import PHASE
from distft.core.stop import STOP

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.types import Engine, Policy
    from distft.data.loader import EvalSteps
    from distft.data.store import Prepared

KEPT_EVERY = 16
"""Micro-batches of each rank between two looks at whether to stop, after which what was computed is on disk."""


@dataclass(frozen=True, kw_only=True)
class RowPass:
    """The prepared rows of a split, how to go through some of them once, and which are batches together."""

    prepared: Prepared
    micro_batches: Callable[[Prepared, np.ndarray], EvalSteps]
    """(prepared rows, indices of some) -> this rank's micro-batches of them."""
    batches: Callable[[], Iterable[np.ndarray]]
    """The rows of each global batch of the run, in order; held-out rows are one batch."""
    trained: bool
    """Its batches are those of training, in the order of the run; else of evaluations, in the order of the files."""
    max_length: int
    """Tokens in a sequence."""

    def steps(self, indices: np.ndarray) -> EvalSteps:
        """Return this rank's micro-batches of some rows."""
        return self.micro_batches(self.prepared, indices)

    def over(self, prepared: Prepared) -> RowPass:
        """Return the same with other rows, made of these."""
        return replace(self, prepared=prepared)

    def in_order(self, micros: Iterable[tuple[int, tuple[int, ...]]]) -> np.ndarray:
        """Return the rows of a batch in its order.

        Args:
            micros: position and rows of all its micro-batches, in any order.
        """
        rows = [row for _, of_micro in sorted(micros) for row in of_micro]
        return np.array(rows if self.trained else sorted(rows), np.int64)


class StoredLogprobs:
    """fp32 log-probability of every supervised token of some prepared rows."""

    def __init__(self, folder: Path, prepared: Prepared) -> None:
        """Open a finished folder."""
        self._values = np.memmap(folder / "logprobs.bin", dtype=np.float32, mode="r")
        self._ends = np.cumsum(prepared.supervised, dtype=np.int64)

    def of(self, rows: tuple[int, ...]) -> Tensor:
        """Return [S], the values of these rows' supervised tokens, in order, on the CPU."""
        import torch

        parts = [self._values[(self._ends[row - 1] if row else 0) : self._ends[row]] for row in rows]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)


def stored_logprobs(
    folder: Path,
    rows: RowPass,
    *,
    engine: Engine,
    policy: Policy,
    is_trained: bool = False,
    say: Callable[[str], None],
) -> StoredLogprobs:
    """Collective: return the log-probabilities in `folder`, after computing those that it lacks.

    Args:
        folder: named by everything that the values depend on.
        rows: what they are of.
        engine: holds the weights before training.
        policy: the model under this engine.
        is_trained: its weights are no longer those before training, so nothing can be computed here.
        say: takes a line for the user.

    Raises:
        MachineError: there is something to compute and the model is trained.
        FileSystemError: on all ranks; the folder cannot be written on some host.
        Preempted: some rank was asked to stop; what was computed is kept.
    """
    files, writes = _Files(folder, rows.prepared), _writes(engine)
    if not are_stored([(folder, rows.prepared)], engine):
        if is_trained:
            raise MachineError(
                "the reference's log-probabilities of these rows are not in this machine's cache, and can be computed "
                "only before training: evaluate during the run, with [[data.eval]]"
            )
        done_N = _agreed(engine, lambda: files.begin() if writes else None)
        todo = np.flatnonzero(~done_N)
        say(f"reference: log-probabilities of {len(todo):,} of {len(done_N):,} rows are computed before training")
        micros = rows.steps(todo)
        with engine.evaluating():
            for first in range(0, len(micros), KEPT_EVERY):
                PHASE.enter("reference")
                computed: list[tuple[tuple[int, ...], np.ndarray]] = []
                for index in range(first, min(first + KEPT_EVERY, len(micros))):
                    batch = engine.place(micros[index])
                    computed.append((batch.rows, policy.token_logprobs(batch).cpu().numpy()))
                parts = [part for of_rank in engine.gather(computed) for part in of_rank]
                _agreed(engine, lambda parts=parts: files.keep(parts) if writes else None)
                if any(engine.gather(STOP.requested())):
                    raise Preempted("stopped while the reference is computed; what was computed is kept")
        _agreed(engine, lambda: files.finish() if writes else None)
    return StoredLogprobs(folder, rows.prepared)


def are_stored(folders: Sequence[tuple[Path, Prepared]], engine: Engine) -> bool:
    """Collective: return whether every host has all of these log-probabilities, whole."""
    writes = _writes(engine)
    return all(engine.gather(not writes or all(_Files(*of_rows).is_complete() for of_rows in folders)))


def _writes(engine: Engine) -> bool:
    """Return whether this rank is the first one on its host."""
    hosts = engine.gather(socket.gethostname())
    return hosts.index(hosts[engine.rank]) == engine.rank


def _agreed(engine: Engine, work: Callable[[], np.ndarray | None]) -> np.ndarray:
    """Do the work of each host; where it fails on one, fail on all. Return the rows that are done on all hosts."""
    done_N, error = None, ""
    try:
        done_N = work()
    except OSError as failure:
        error = f"{failure.filename or ''}: {failure.strerror or failure}"
    answers = engine.gather((None if done_N is None else done_N.tobytes(), error))
    for _, problem in answers:
        if problem:
            raise FileSystemError(
                f"the reference's log-probabilities cannot be written ({problem})  "
                "set [data] cache_dir to a folder that can"
            )
    masks = [np.frombuffer(mask, bool) for mask, _ in answers if mask is not None]
    return np.logical_and.reduce(masks) if masks else np.zeros(0, bool)


class _Files:
    """The folder of one host's writer, which appears under its name when it is whole."""

    def __init__(self, folder: Path, prepared: Prepared) -> None:
        self._folder, self._supervised = folder, prepared.supervised
        self._part = folder.with_name(f".part-{folder.name}-{socket.gethostname()}")
        self._ends = np.cumsum(self._supervised, dtype=np.int64)

    def is_complete(self) -> bool:
        """Return whether the finished folder is there and holds what was written into it."""
        try:
            meta = json.loads((self._folder / "meta.json").read_text(encoding="utf-8"))
            with (self._folder / "logprobs.bin").open("rb") as file:
                return meta["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError, KeyError):
            return False

    def begin(self) -> np.ndarray:
        """Return which rows are done, bool [N]; make the files where there are none."""
        shutil.rmtree(self._folder, ignore_errors=True)  # it was found damaged
        size = 4 * int(self._ends[-1])
        values, done = self._part / "logprobs.bin", self._part / "done.bin"
        if not (done.is_file() and values.is_file() and values.stat().st_size == size):
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
            with values.open("wb") as file:
                file.truncate(size)
            done.write_bytes(bytes(len(self._ends)))
        return np.frombuffer(done.read_bytes(), bool)

    def keep(self, parts: list[tuple[tuple[int, ...], np.ndarray]]) -> None:
        """Write the values of some rows, and then that they are there."""
        with (self._part / "logprobs.bin").open("r+b") as file:
            for rows, values in parts:
                begin = 0
                for row in rows:
                    count = int(self._supervised[row])
                    file.seek(4 * int(self._ends[row] - count))
                    file.write(values[begin : begin + count].astype(np.float32).tobytes())
                    begin += count
            file.flush()
            os.fsync(file.fileno())
        with (self._part / "done.bin").open("r+b") as file:
            for row in (row for rows, _ in parts for row in rows):
                file.seek(row)
                file.write(b"\1")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Let the folder appear under its name."""
        with (self._part / "logprobs.bin").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (self._part / "meta.json").write_text(json.dumps({"sha256": digest}), encoding="utf-8")
        if not self._folder.exists():  # another host's, on a file system that both see
            self._part.rename(self._folder)
