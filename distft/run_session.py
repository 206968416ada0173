"""One process's part of a run, from the lock on the run folder to the word in exit.json about how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distft.core.ending import exit_code, reason
from distft.core.errors import DONE, MachineError, PeerEnded
from distft.core.phase import PHASE
from distft.core.stop import STOP
from distft.core.types import TrainState
from distft.run_folder import RunFolder

if TYPE_CHECKING:
    from distft.checkpoint.lock import RunLock
    from distft.engine.processes import Processes
    from distft.health.watchdog import Watchdog
    from distft.recipe import Recipe

Say = Callable[[str], None]
"""Takes a line for the user."""


def print_line(line: str) -> None:
    """Print a line of the job to stderr."""
    print(f"distft: {line}", file=sys.stderr, flush=True)


def print_nothing(line: str) -> None:
    """Drop the line: ranks other than 0 have nothing to say that rank 0 does not."""


@dataclass(kw_only=True)
class RunSession:
    """A process that takes part in a run: it holds the folder's lock, is watched, and can be asked to stop."""

    recipe: Recipe
    folder: RunFolder
    rank: int
    world: int
    launcher: str
    say: Say
    lock: RunLock | None
    """Rank 0's; None on the others."""
    watch: Watchdog
    write_end: Callable[[int, str], bool]
    """(exit code, reason) -> whether this process was the first to write them to exit.json; gives the lock back."""
    resources: contextlib.ExitStack
    """What is closed when the run is left, last opened first."""
    state: TrainState = field(default_factory=TrainState)
    """Where training ended, for exit.json."""

    def join(self) -> Processes:
        """Join the other processes of the run, and let the watchdog know where they are."""
        from distft.engine import flight_recorder, processes

        # Longer than the watchdog's patience: it ends a hang first, and knows whose it is.
        traces, timeout_s = self.folder.path / "ranks", 60 + 2 * self.recipe.guard.hang_timeout_s
        joined = processes.join(timeout_s=timeout_s, record_in=traces)
        self.resources.callback(processes.leave, joined)
        self.watch.on(str(joined.device), lambda: flight_recorder.write(traces, joined.rank))
        return joined

    def stop(self) -> bool:
        """Return whether this process has been asked to stop; the loss of its lock asks too."""
        if self.lock is not None and self.lock.lost:
            STOP.ask("the loss of its lock")
        return STOP.requested()

    @property
    def lost_lock(self) -> bool:
        """Whether another run has taken the folder."""
        return self.lock is not None and self.lock.lost

    @contextlib.contextmanager
    def explaining_out_of_memory(self, advice: Callable[[], str]) -> Iterator[None]:
        """Turn running out of memory into a message that says where, and what to change.

        Raises:
            MachineError: memory ran out.
        """
        from distft.core.out_of_memory import held, is_out_of_memory

        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            where = f"the {PHASE.phase} of step {PHASE.step}" if PHASE.step else f"the phase {PHASE.phase}"
            short = MachineError(f"memory ran out in {where}{held()}")
            # Before the advice, which takes seconds, in which the other ranks would wait.
            self.write_end(exit_code(short), reason(short))
            hint = "" if self.recipe.train.rehearse else "\n[train] rehearse = true finds this out in the first minute"
            raise MachineError(f"{short}\n{advice()}{hint}") from error


@contextlib.contextmanager
def run_session(recipe: Recipe, folder: RunFolder, *, say: Say) -> Iterator[RunSession]:
    """Hold the run's folder while this process takes part, watch over it, and write down how it ends.

    Raises:
        BusyError: another run holds the folder.
    """
    from distft.checkpoint.lock import RunLock
    from distft.engine import processes
    from distft.engine.determinism import deterministic
    from distft.health.watchdog import Watchdog

    launcher, rank, world, local_rank = processes.detect_launcher(os.environ)
    lock = RunLock(folder.path) if rank == 0 else None

    def write_end(code: int, why: str) -> bool:
        first = folder.end(code=code, reason=why, rank=rank)
        if lock is not None:
            lock.release()
        return first

    watch = Watchdog(
        folder.path,
        rank=rank,
        world=world,
        neighbours=processes.neighbours(os.environ, rank, world, local_rank),
        timeout_s=recipe.guard.hang_timeout_s,
        launched=launcher in ("accelerate", "torchrun") and world > 1,
        end=write_end,
    )
    fixed = deterministic(recipe.train.deterministic)
    with lock or contextlib.nullcontext(), watch, fixed, processes.leaving() as resources:
        session = RunSession(
            recipe=recipe,
            folder=folder,
            rank=rank,
            world=world,
            launcher=launcher,
            say=say,
            lock=lock,
            watch=watch,
            write_end=write_end,
            resources=resources,
        )
        STOP.watch(folder.path / "STOP")
        try:
            yield session
        except BaseException as raised:
            error = watch.cause(raised)
            if not session.lost_lock:  # then the folder belongs to another run
                folder.end(code=exit_code(error), reason=reason(error), rank=rank, follows=isinstance(error, PeerEnded))
                folder.note("ended", code=exit_code(error), reason=reason(error))
            if error is raised:
                raise
            raise error from raised
        folder.end(code=DONE, reason="done", state=session.state, recipe_sha256=recipe.digest(), rank=rank)
        folder.note("ended", code=DONE, reason="done")
