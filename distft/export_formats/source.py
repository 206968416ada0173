"""What `distft export` and `distft chat` are given: a run, a checkpoint of one, or a folder of a model or adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distft.core.errors import CheckpointError, Problem, RecipeError
from distft.core.files import read_json_object

Kind = Literal["text", "reward"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on this machine."""

    given: str
    """As it was written on the command line."""
    folder: Path
    """Holds config.json and weights, or adapter_config.json and an adapter."""
    is_adapter: bool
    kind: Kind
    """Whether it writes text or gives a reward."""
    run: Path | None
    """The run folder that it came out of."""
    label: str
    """`final`, `step-00000400`, or the folder's name."""

    @property
    def name(self) -> str:
        """A plain name for files and cards: the run's, or the folder's."""
        if self.run is None:
            return self.folder.name
        return self.run.name if self.label == "final" else f"{self.run.name}-{self.label}"


def open_source(given: str, workdir: Path) -> ModelSource:
    """Return the model that `given` means; a checkpoint is put together in `workdir`.

    Raises:
        RecipeError: there is no such model.
        CheckpointError: the checkpoint is damaged.
    """
    place = Path(given).expanduser()
    if (place / "recipe.toml").is_file() and (place / "manifest.json").is_file():
        if not (place / "final").is_dir():
            steps = sorted(path.name for path in (place / "checkpoints").glob("step-*[0-9]"))
            raise _mistake(
                given, "the run has no final/: it has not ended yet",
                f"allowed: a checkpoint of it ({', '.join(steps) or 'none is there yet'})",
            )  # fmt: skip
        return _folder(given, place / "final", run=place, label="final")
    if (place / "MANIFEST.json").is_file():
        from distft.export_formats.checkpoint_folder import rebuild

        run = place.resolve().parents[1]
        if not (run / "recipe.toml").is_file():
            raise _mistake(given, "the checkpoint lies in no run folder", "allowed: RUN/checkpoints/step-00000400")
        try:
            return _folder(given, rebuild(run, place, workdir / place.name), run=run, label=place.name)
        except (ValueError, LookupError) as error:
            raise CheckpointError(f"{place}: {error}") from error
    run = place.resolve().parent
    is_run = (run / "recipe.toml").is_file() and place.resolve().name == "final"
    return _folder(given, place, run=run if is_run else None, label=place.resolve().name)


def _folder(given: str, folder: Path, *, run: Path | None, label: str) -> ModelSource:
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        task = _json(adapter).get("task_type")
        kind: Kind = "reward" if task == "SEQ_CLS" else "text"
        return ModelSource(given=given, folder=folder, is_adapter=True, kind=kind, run=run, label=label)
    if config.is_file():
        names = _json(config).get("architectures") or []
        rewards = any(str(name).endswith("ForSequenceClassification") for name in names)
        kind = "reward" if rewards else "text"
        return ModelSource(given=given, folder=folder, is_adapter=False, kind=kind, run=run, label=label)
    there = (
        "there is no such folder"
        if not folder.is_dir()
        else "it is neither a run, a checkpoint, a model nor an adapter"
    )
    raise _mistake(
        given, there,
        "allowed: a run's folder, RUN/checkpoints/step-…, a folder with config.json or adapter_config.json",
    )  # fmt: skip


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: of generation_config.json, else of config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        found = read_json_object(folder / name).get("eos_token_id")
        if found is not None:
            ids = [found] if isinstance(found, int) else list(found)
            first = tokenizer.eos_token_id
            return tuple(sorted(dict.fromkeys(ids), key=lambda token: token != first))
    return (tokenizer.eos_token_id,)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _mistake(str(path), f"cannot be read as JSON: {error}", "fetch it again") from None
    if not isinstance(content, dict):
        raise _mistake(str(path), "is no JSON object", "fetch it again")
    return content


def _mistake(given: str, message: str, fix: str) -> RecipeError:
    return RecipeError(f"distft export {given}", [Problem(message=message, fix=fix)])
