"""Whether a recipe fits its model and its rows, as far as that is known without weights: from the model's config.

Found before rows are prepared where only the config is asked, before any process group and accelerator in any case.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.core.files import replace_json
from distft.data.formats import FORMATS
from distft.data.preparation_report import PrepareReport
from distft.data.prepared_folder import cache_folder
from distft.export import EXPORTS
from distft.model import skeleton
from distft.model.adapters import targets
from distft.model.adapters.spec import leaves_base_alone
from distft.model.heads import HEADS
from distft.objectives import OBJECTIVES, ObjectiveSpec
from distft.recipe import Recipe, listed_params
from distft.recipe.origin import RecipeMistake


def refuse_missing_folder(recipe: Recipe) -> None:
    """Refuse a missing path that can be no hub id; nothing heavy is imported and nothing fetched for this.

    Raises:
        RecipeError: with the line of the path.
    """
    mistakes = [
        RecipeMistake(key=("model", key), message=message, fix=fix)
        for key, path in (("path", recipe.model.path), ("tokenizer", recipe.model.tokenizer))
        if path is not None
        for message, fix in _missing(path, key)
    ]
    _refuse(recipe, mistakes)


def has_config(recipe: Recipe) -> bool:
    """Return whether training could start from the model; False for a folder that holds a tokenizer alone."""
    folder = Path(recipe.model.path).expanduser()
    return not folder.is_dir() or (folder / "config.json").is_file()


def refuse_misfits(recipe: Recipe, folder: Path | None = None) -> None:
    """Check that the model is there, has every module that the method names, and can do what the recipe asks.

    Args:
        recipe: the recipe.
        folder: holds config.json, where it is not the recipe's model's.

    Raises:
        RecipeError: every mistake found, with its line.
    """
    if folder is None:
        refuse_missing_folder(recipe)
        with with_model_line(recipe):
            folder = skeleton.find_config(recipe.model)
    params: Any = recipe.method.params
    head = HEADS[recipe.objective.spec.head_of(recipe.objective.params)]
    if recipe.eval.answers and not head.generates:
        message = f'objective "{recipe.objective.name}" trains a {head.name} head, which cannot answer'
        fix = "leave [[eval.answers]] out; [[data.eval]] measures held-out rows"
        _refuse(recipe, [RecipeMistake(key=("eval", "answers"), message=message, fix=fix)])
    if recipe.method.spec.penalty is not None and not recipe.objective.spec.perplexity:
        message = (
            f'"{recipe.method.name}" adds to the loss of tokens, which objective "{recipe.objective.name}" has not'
        )
        _refuse(recipe, [RecipeMistake(key=("method", "name"), message=message, fix='name = "lora"')])
    _refuse(recipe, list(_exports_that_cannot_be(recipe)))
    _refuse(recipe, list(_references_that_cannot_be(recipe, folder)))
    _refuse(recipe, list(_teachers_that_cannot_be(recipe, folder)))
    _refuse_missing_head(recipe, folder)
    if not targets.are_named(params):
        return
    _refuse(recipe, targets.faults(_listing(recipe, folder), params))


def _refuse_missing_head(recipe: Recipe, folder: Path) -> None:
    """Check that the architecture has the head that the objective trains."""
    head = HEADS[recipe.objective.spec.head_of(recipe.objective.params)]
    if head.hold is not None:
        from distft.model import load

        with with_model_line(recipe):
            head.auto_class(head.prepare(load.read_config(folder)))


def _exports_that_cannot_be(recipe: Recipe) -> Iterator[RecipeMistake]:
    head = HEADS[recipe.objective.spec.head_of(recipe.objective.params)]
    for index, chosen in enumerate(recipe.export.also):
        spec = EXPORTS[chosen["name"]]
        twice = any(earlier["name"] == spec.name for earlier in recipe.export.also[:index])
        why = spec.refuses(listed_params(chosen, spec.params), recipe.method.spec, head)
        why = f'"{spec.name}" is written twice, to one folder' if twice else why
        if why:
            yield RecipeMistake(key=("export", "also", index, "name"), message=why, fix="leave this export out")


def _teachers_that_cannot_be(recipe: Recipe, folder: Path) -> Iterator[RecipeMistake]:
    """Compare the teacher with the trained model: one tokenizer; the rest may differ."""
    path, key = recipe.objective.spec.teacher(recipe.objective.params), ("objective", "teacher")
    if path is None:
        return
    try:
        there = skeleton.find_config(recipe.model.model_copy(update={"path": path, "revision": None}))
    except RecipeError as error:
        message = error.problems[0].message.replace(f'[model] path = "{path}"  ', f'"{path}": ')
        yield RecipeMistake(key=key, message=message, fix="a folder with config.json, or a hub id owner/name")
        return
    mine, theirs = _vocabulary(folder), _vocabulary(there)
    if None in (mine, theirs):
        message = f'"{path}" or the model has no tokenizer.json, so that its ids cannot be compared'
        yield RecipeMistake(key=key, message=message, fix="models with their tokenizers")
    elif mine != theirs:
        message = f'"{path}" has another tokenizer than the model that is trained: its ids mean other tokens'
        yield RecipeMistake(key=key, message=message, fix="take a teacher of the same family")


_OF_THE_FILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Keys of a config that may differ between models of one architecture: logits do not depend on them."""


def _references_that_cannot_be(recipe: Recipe, folder: Path) -> Iterator[RecipeMistake]:
    """Compare the reference with the trained model: one config, one tokenizer."""
    spec, key = recipe.method.spec, ("objective", "reference")
    path = recipe.objective.spec.reference(recipe.objective.params)
    if path is None:
        return
    if spec.adapter and not leaves_base_alone(spec, recipe.method.params):
        message = f'method "{spec.name}" as it is set cannot be left out: no other model can be its reference'
        yield RecipeMistake(key=key, message=message, fix="leave reference out, or choose another method")
        return
    there = Path(path).expanduser()
    if (there / "adapter_config.json").is_file() and not (there / "config.json").is_file():
        message = f'"{path}" is an adapter, which is no model by itself'
        yield RecipeMistake(key=key, message=message, fix="merge it into its base first")
        return
    from distft.model import load

    table = recipe.model.model_copy(update={"path": path, "revision": None})
    try:
        other = skeleton.find_config(table)
    except RecipeError as error:
        message = error.problems[0].message.replace(f'[model] path = "{path}"  ', f'"{path}": ')
        yield RecipeMistake(key=key, message=message, fix="a folder with config.json, or a hub id owner/name")
        return
    mine, theirs = (load.read_config(place).to_dict() for place in (folder, other))
    names = sorted(name for name in {*mine, *theirs} - {*_OF_THE_FILE} if mine.get(name) != theirs.get(name))
    if names:
        shown = "; ".join(f"{name}: {theirs.get(name)!r}, here {mine.get(name)!r}" for name in names[:4])
        message = f'"{path}" is another architecture than the model that is trained ({shown})'
        yield RecipeMistake(key=key, message=message, fix="a reference has the trained model's config.json")
        return
    vocabularies = [_vocabulary(place) for place in (folder, other)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        message = f'"{path}" has another tokenizer than the model that is trained: its ids mean other tokens'
        yield RecipeMistake(key=key, message=message, fix="a reference reads the tokens that the rows become")


def _vocabulary(folder: Path) -> Any:
    """Return the tokens and their ids that a folder's tokenizer.json names; None where it has none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    return content.get("model", {}).get("vocab"), added


def refuse_long_rows(recipe: Recipe, longest: int, split: str) -> None:
    """Check that rows are not longer than the positions that the model was made for.

    Args:
        recipe: the recipe.
        longest: tokens in the longest document that is kept.
        split: "train" or "eval", whose rows these are.

    Raises:
        RecipeError: they are, with the line of max_length.
    """
    with with_model_line(recipe):
        folder = skeleton.find_config(recipe.model)
    if skeleton.has_positions(folder, longest):
        return
    from distft.model import load

    with with_model_line(recipe):
        limit = skeleton.num_positions(load.read_config(folder))
    if limit is None or longest <= limit:
        return
    fault = RecipeMistake(
        key=("data", "max_length"),
        message=f"lets [[data.{split}]] rows of {longest:,} tokens through, and the model has {limit:,} positions",
        fix=f"set [data] max_length = {limit}; a model that is to learn longer texts says so itself, in its "
        "config.json: max_position_embeddings, or rope scaling",
    )
    _refuse(recipe, [fault])


def refuse_other_rows(recipe: Recipe, report: PrepareReport, split: str) -> None:
    """Check that rows have as many documents as the objective trains together, and the values it needs.

    Args:
        recipe: the recipe.
        report: of the prepared rows.
        split: "train" or "eval", whose rows these are.

    Raises:
        RecipeError: they have not, with the line of the objective.
    """
    objective, formats = recipe.objective, sorted({source.format for source in report.sources})
    unanswered = [name for name in formats if not FORMATS[name].answered]
    if unanswered and (split == "eval" or not objective.spec.writes):
        writing = ", ".join(name for name, spec in OBJECTIVES.items() if spec.writes)
        if split == "eval":
            message, fix = "measures the loss of answers", "take [[eval.answers]]"
        else:
            message, fix = "learns from answers", f"rows with answers, or one of the objectives {writing}"
        message += f", and rows of the format {unanswered[0]} of [[data.{split}]] hold none"
        mistake = RecipeMistake(
            key=("objective", "name"), message=f'"{objective.name}" {message}', fix=fix, also=(("data", split),)
        )
        _refuse(recipe, [mistake])
    decisive = {name for source in formats for name in FORMATS[source].decisive}

    def fits(spec: ObjectiveSpec) -> bool:
        return spec.group_size == report.group_size and set(spec.decisive) == decisive

    if fits(objective.spec):
        return
    fitting = ", ".join(name for name, spec in OBJECTIVES.items() if fits(spec))
    if objective.spec.group_size != report.group_size:
        message = (
            f"trains {objective.spec.group_size} document(s) a row together, and the format {', '.join(formats)} of "
            f"[[data.{split}]] makes {report.group_size} of each row"
        )
    elif decisive:
        message = (
            f"would train every answer, and the format {', '.join(formats)} of [[data.{split}]] says which are good"
        )
    else:
        message = (
            f"needs rows that say which answers are good, and the format {', '.join(formats)} of [[data.{split}]] "
            'does not; the column is "label"'
        )
    fault = RecipeMistake(
        key=("objective", "name"),
        message=f'= "{objective.name}" {message}',
        fix=f"such rows are trained by the objectives {fitting}" if fitting else "choose another format",
    )
    _refuse(recipe, [fault])


def fitting_values(objective: ObjectiveSpec) -> tuple[str, ...]:
    """Return the names of the numbers of rows that an objective may be given (`FormatSpec.values`)."""
    fitting = [
        spec
        for spec in FORMATS.values()
        if (spec.group_size, set(spec.decisive)) == (objective.group_size, set(objective.decisive))
    ]
    return tuple(dict.fromkeys(name for spec in fitting for name in spec.values))


def _listing(recipe: Recipe, folder: Path) -> targets.Listing:
    """Return the model's modules; kept by config, versions and code, as building them imports torch."""
    parts = [(folder / "config.json").read_bytes(), version("transformers").encode()]
    parts.append(recipe.objective.spec.head_of(recipe.objective.params).encode())
    parts += [Path(file).read_bytes() for module in (skeleton, targets) if (file := module.__file__)]
    kept = cache_folder(recipe.data) / "modules" / f"{hashlib.sha256(b''.join(parts)).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return targets.Listing.from_json(json.loads(kept.read_text(encoding="utf-8")))
    from distft.model import load

    with with_model_line(recipe):
        listed = targets.listing(
            skeleton.build(load.read_config(folder), HEADS[recipe.objective.spec.head_of(recipe.objective.params)])
        )
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_json(kept, listed.to_json())
    return listed


def _missing(path: str, key: str) -> list[tuple[str, str]]:
    folder = Path(path).expanduser()
    what = "config.json" if key == "path" else "tokenizer.json"
    if folder.is_dir():
        if (folder / what).is_file() or key == "tokenizer":
            return []
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        return [(f"the folder has no {what} (it holds: {held})", f"a folder with {what}, or a hub id owner/name")]
    if folder.exists():
        return [("is a file, not a folder", f"the folder with {what}, or a hub id owner/name")]
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return [("no such folder", _nearest(folder) or f"a folder with {what}, or a hub id owner/name")]
    return []


def _nearest(folder: Path) -> str:
    """Return a hint at a folder beside it with almost this name."""
    from distft.core.registry import nearest

    try:
        beside = [sibling.name for sibling in folder.parent.iterdir() if sibling.is_dir()]
    except OSError:
        above = next((parent for parent in folder.parents if parent.is_dir()), None)
        return "" if above is None else f"{above} is there, {folder.relative_to(above).parts[0]} in it is not"
    meant = nearest(folder.name, beside)
    return f"did you mean {folder.parent / meant}?" if meant else ""


def tokenizer_of(recipe: Recipe) -> tuple[str, str | None]:
    """Return (path, revision) of the tokenizer: the model's unless the recipe names another, with added tokens.

    Raises:
        RecipeError: a token that is to be added is there already.
        DataError: tokens are to be added, and there is no tokenizer.
    """
    model = recipe.model
    path, revision = (model.path, model.revision) if model.tokenizer is None else (model.tokenizer, None)
    if not any(model.added):
        return path, revision
    from distft.core.added_tokens import longer_tokenizer

    with with_model_line(recipe):
        return str(longer_tokenizer(path, revision, *model.added, cache_folder(recipe.data))), None


@contextlib.contextmanager
def with_model_line(recipe: Recipe) -> Iterator[None]:
    """Add the line of [model] path, or of what [method] says, to errors of the model, raised inside the context.

    Raises:
        RecipeError: the one from inside, with the line.
    """
    try:
        yield
    except RecipeError as error:
        if any(problem.line for problem in error.problems):
            raise
        problems = [
            Problem(message=problem.message, line=_line(recipe, problem.message), fix=problem.fix)
            for problem in error.problems
        ]
        raise RecipeError(recipe.source, problems) from error


def _line(recipe: Recipe, message: str) -> int | None:
    """Return the line of the key that a message begins with, such as `[method] key`; else of the method, or the model.

    A list has the line that it begins in.
    """
    table, _, rest = message.partition(" ")
    key = rest.partition(" ")[0].rstrip(":")
    if table != "[method]":
        return (recipe.line_of(f"model.{key}") if table == "[model]" else None) or recipe.line_of("model.path")
    return recipe.line_of(f"method.{key}") or recipe.line_of("method.name")


def _refuse(recipe: Recipe, faults: list[RecipeMistake]) -> None:
    if faults:
        raise RecipeError(recipe.source, [recipe.origin.problem(fault) for fault in faults])
