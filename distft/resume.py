"""Saving and continuing a run: what a checkpoint says of it, and whether what it says fits the run that wants it.

Tensors are the engine's business (`distft.engine.fragments`), files the checkpoint room's. Here is what lies between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from distft.core.errors import CheckpointError, DataError, NumericError, RecipeError
from distft.core.phase import PHASE
from distft.recipe import parse_recipe
from distft.recipe.resume_policy import STRICTEST_FIRST, Policy, ResumePolicy
from distft.recipe.schema import Recipe, Registries, RunKeys, fixed_tables
from distft.recipe.toml_text import toml_text

if TYPE_CHECKING:
    from distft.checkpoint.commit import Saved
    from distft.checkpoint.loading import Loaded
    from distft.checkpoint.store import CheckpointStore
    from distft.core.types import Engine, TrainState

log = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path
"""auto: from the newest valid checkpoint, if any; never: from the start; a folder: from that checkpoint."""

MAX_FAILURES = 2
"""Saves that may fail in a row before the run stops."""


class CheckpointManager:
    """What the loop saves through; every method is collective."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        about: dict[str, Any],
        *,
        asynchronous: bool,
        grace_s: float,
        reached: Callable[[int], None],
        note: Callable[..., None],
        judges: Callable[[], dict[str, Any]],
    ) -> None:
        """Nothing happens yet.

        Args:
            store: the files.
            engine: the tensors.
            about: what the checkpoint says of the run besides its position.
            asynchronous: write in the background.
            grace_s: a save that takes longer is warned of.
            reached: told every step.
            note: takes events for the run folder.
            judges: states of whoever decides over the run's course, by name.
        """
        self._store, self._engine, self._about, self._async = store, engine, about, asynchronous
        self._grace_s, self._reached, self._note, self._judges = grace_s, reached, note, judges
        self._saved_at = -1
        self._warned = False

    def prepare(self) -> None:
        """Take the memory that background saves copy into, so that the first one does not wait for it.

        Optimizers make their moments, most of it, in their first step: they are made here before.
        """
        if self._async:
            self._engine.create_state()
            self._store.reserve(list(self._engine.pieces()))

    def save(self, state: TrainState, best: dict[str, Any] | None = None) -> None:
        """Write the state of this step; in the background if the recipe says so. `best`: what best.json is to say.

        Raises:
            CheckpointError: two saves in a row failed.
        """
        self._write(state, background=self._async, best=best)

    def save_now(self, state: TrainState) -> None:
        """Write the state of this step and wait until it is committed; nothing if it already is."""
        self._guarded(self._store.finish)
        if self._saved_at != state.step:
            self._write(state, background=False)

    def poll(self, state: TrainState) -> None:
        """Commit what was written in the background, if every rank has written its part."""
        self._reached(state.step)
        PHASE.enter("step")
        if self._store.in_flight:
            self._guarded(self._store.poll)

    def close(self) -> None:
        """Wait for what is in flight."""
        self._guarded(self._store.finish)

    def best(self) -> Loaded | None:
        """Return the best state's checkpoint, None when no evaluation during training was the best.

        Raises:
            CheckpointError: it is not valid.
        """
        self._guarded(self._store.finish)
        return self._store.load_best()

    def go_back(self, step: int) -> Loaded:
        """Go back to the newest valid checkpoint before the update that led to `step`; later ones are set aside.

        Raises:
            NumericError: there is none.
        """
        self._guarded(self._store.finish)
        aside = self._store.set_aside_after(step - 2)
        loaded = self._store.load_newest()
        if loaded is None:
            raise NumericError(f"step {step}: the run should go back, and there is no checkpoint from before it")
        self._saved_at = loaded.step
        self._note("rolled_back", step=loaded.step, spike=step, set_aside=aside)
        return loaded

    def _write(self, state: TrainState, *, background: bool, best: dict[str, Any] | None = None) -> None:
        pieces = list(self._engine.pieces())
        say = {"train": asdict(state), **self._judges(), **self._about}
        save = self._store.save_async if background else self._store.save
        self._guarded(lambda: save(pieces, say, step=state.step, best=best))
        self._saved_at = state.step

    def _guarded(self, work: Any) -> None:
        """Survive one failed save: the checkpoints before it are untouched, and the next may succeed."""
        from distft.checkpoint.commit import Saved, SaveFailed

        try:
            outcome = work()
        except SaveFailed as error:
            self._saved_at = -1
            self._note("save_failed", why=str(error))
            if self._store.failures_in_a_row >= MAX_FAILURES:
                raise
            if self._engine.rank == 0:
                log.warning("%s; training goes on", error)
            return
        if isinstance(outcome, Saved) and outcome.num_bytes:
            self._report_save(outcome)

    def _report_save(self, saved: Saved) -> None:
        blocked, total = round(saved.blocked_s, 3), round(saved.total_s, 3)
        self._note("saved", step=saved.step, bytes=saved.num_bytes, blocked_s=blocked, total_s=total)
        if saved.total_s > self._grace_s and not self._warned and self._engine.rank == 0:
            self._warned = True
            log.warning(
                "a save takes %.1f s and the grace before a kill is %.1f s: give more time, or save more often",
                saved.total_s,
                self._grace_s,
            )


def about(recipe: Recipe, fingerprint: dict[str, str], base: str, num_steps: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run: JSON, equal on all ranks."""
    mix = [[source.weight, source.share] for source in recipe.data.train]
    return {"recipe": recipe.resolved(), "data": fingerprint, "mix": mix, "base": base, "num_steps": num_steps}


def check_fits(
    saved: dict[str, Any], now: dict[str, Any], where: Path, *, registries: Registries, allow_changes: bool
) -> list[str]:
    """Compare a checkpoint's record of its run with the run that is to continue it.

    A checkpoint from before there was a key means the key's default.

    Returns:
        Changes that were allowed, for the log.

    Raises:
        DataError: the prepared training rows are others.
        CheckpointError: the base weights are others, or the recipe changed in a way that breaks or may break the run.
    """
    if saved["data"]["train"] != now["data"]["train"]:
        raise DataError(
            f"{where}: was trained on other rows (sha256 {saved['data']['train'][:12]}…, now "
            f"{now['data']['train'][:12]}…): the order of samples would not go on  "
            "restore the data, or start anew with --resume never or another name"
        )
    if saved["base"] and now["base"] and saved["base"] != now["base"]:
        raise CheckpointError(f"{where}: belongs to other base weights than [model] path now names")
    refused, to_confirm, harmless = [], [], []
    if saved["mix"] != now["mix"]:
        refused.append(f"weight and share of [[data.train]]: {saved['mix']} -> {now['mix']}")
    try:
        earlier = parse_recipe(toml_text(saved["recipe"]), source=str(where), registries=registries).resolved()
    except RecipeError as error:
        raise CheckpointError(f"{where}: was written under a recipe that this version does not read\n{error}") from None
    for key, before, after in _changes(earlier, now["recipe"]):
        kinds = {"free": harmless, "ask": to_confirm, "fixed": refused}
        kinds[resume_policy(key)].append(f"{key}: {before!r} -> {after!r}")
    if refused:
        raise CheckpointError(
            f"{where}: the recipe has changed in a way that this checkpoint cannot continue\n  "
            + "\n  ".join(refused)
            + "\nchange it back, or start anew with --resume never or another name"
        )
    if to_confirm and not allow_changes:
        raise CheckpointError(
            f"{where}: the recipe has changed\n  "
            + "\n  ".join(to_confirm)
            + "\nif that is meant, say --allow-changes; else change it back"
        )
    return harmless + to_confirm


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def resume_policy(key: str) -> Policy:
    """Return whether `key` ("table", "table.key" or a key above the tables) may change between the starts of a run.

    A whole table that comes or goes is judged by its strictest key, and what is not known is fixed.
    """
    table, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    hint = get_type_hints(Recipe, include_extras=True).get(table)
    if not rest and table in RunKeys.model_fields:
        return _marked(RunKeys.model_fields[table].metadata, "fixed")
    of_table = _mark(getattr(hint, "__metadata__", ()))
    if of_table is not None and name in of_table.ask:
        return "ask"
    default: Policy = "fixed" if of_table is None else of_table.policy
    table_class = fixed_tables().get(table)
    if table_class is None:
        return default
    policies: dict[str, Policy] = {
        field_name: _marked(known_field.metadata, default)
        for field_name, known_field in table_class.model_fields.items()
    }
    return policies.get(name, default) if rest else min(policies.values(), key=STRICTEST_FIRST.index)


def _marked(metadata: Iterable[Any], default: Policy) -> Policy:
    mark = _mark(metadata)
    return default if mark is None else mark.policy


def _mark(metadata: Iterable[Any]) -> ResumePolicy | None:
    return next((item for item in metadata if isinstance(item, ResumePolicy)), None)
