"""What an adapter verb was given, found: a run, an adapter's folder, or a hub id, with its base and held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distft.catalog import REGISTRIES
from distft.core import hub
from distft.core.errors import DataError, RecipeError
from distft.core.tokenizer_files import tokenizer_folder
from distft.data.prepare import prepare
from distft.data.prepared_folder import cache_folder
from distft.data.store import Prepared
from distft.merging.adapter_config import CONFIG, WEIGHTS, adapter_mistake, read_adapter_config
from distft.merging.base_model import TrainedIn4bit
from distft.merging.comparison import MAX_ROWS
from distft.merging.delta_sources import is_model
from distft.merging.merging import MergeSource
from distft.merging.model_writer import has_tokenizer
from distft.model.load import find_folder
from distft.recipe import Recipe, load_recipe
from distft.recipe.evaluation import SourceTable
from distft.recipe.schema import DataTable, ModelTable, TrainSourceTable

_LONGEST = 4096
"""Tokens of a row of `--rows` where no recipe says it; longer ones are left out, and the comparison reads the start."""


def find_source(text: str, base: str | None) -> MergeSource:
    """Return the adapter that `text` means, and its base: `base` where it is given, else what run or adapter name.

    Raises:
        RecipeError: there is none, it is a whole model, or nothing says what its base is.
    """
    place = find_place(text)
    if is_model(place):
        raise adapter_mistake(text, f"{place} is a whole model already", "nothing to merge; it can be served as it is")
    config = read_adapter_config(place)
    recipe = recipe_of(place)
    if recipe is None:
        return MergeSource(
            adapter=place, base=base_folder(base or config.base, text, config.revision if not base else None)
        )
    if recipe.model.init == "random" and base is None:
        message = 'the run began from random weights ([model] init = "random"), which no folder holds'
        raise adapter_mistake(text, message, "--base FOLDER with the weights")
    tokenizer = recipe.model.tokenizer
    return MergeSource(
        adapter=place,
        base=find_folder(recipe.model) if base is None else base_folder(base, text, None),
        tokenizer=None if tokenizer is None else tokenizer_folder(tokenizer),
        in_4bit=in_4bit_of(recipe),
    )


def find_place(text: str) -> Path:
    """Return the folder of an adapter or a model: of a run its final/, of a hub id its files here.

    Raises:
        RecipeError: there is no such thing.
    """
    folder = Path(text).expanduser()
    if (folder / "recipe.toml").is_file():
        final = folder / "final"
        if not final.is_dir():
            raise adapter_mistake(
                text, "the run has no final/: it has not come to its end", "distft status, or finish it"
            )
        return final
    if (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return folder
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise adapter_mistake(
            text,
            "neither a run, nor a folder with adapter_config.json or config.json",
            "runs/NAME, a folder, or owner/name",
        )
    try:
        return hub.snapshot(text, None, ["*.json", "*.jinja", "tokenizer.model", WEIGHTS])
    except Exception as error:  # the hub library raises many kinds; all mean: not to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise adapter_mistake(
            text, f"no such folder here, and the hub did not give it: {reason}", "download it once and give the folder"
        ) from None


def base_folder(text: str | None, source: str, revision: str | None) -> Path:
    """Return the folder of a base model.

    Raises:
        RecipeError: nothing says what it is, or it is not there.
    """
    if not text:
        raise adapter_mistake(source, f"{CONFIG} names no base_model_name_or_path", "--base FOLDER or owner/name")
    try:
        return find_folder(ModelTable(path=text, revision=revision))
    except RecipeError as error:
        reason = error.problems[0].message.removeprefix(f'[model] path = "{text}"  ')
        raise adapter_mistake(source, f"base {text}: {reason}", "--base FOLDER or owner/name") from None


def recipe_of(place: Path) -> Recipe | None:
    """Return the recipe of the run whose final/ this is."""
    file = place.parent / "recipe.toml"
    return load_recipe(file, registries=REGISTRIES) if place.name == "final" and file.is_file() else None


def in_4bit_of(recipe: Recipe) -> TrainedIn4bit | None:
    """Return how the run stored its base, where it did so in 4 bits."""
    params = recipe.method.spec.quant(recipe.method.params)
    return None if params is None else TrainedIn4bit(params=params, dtype=getattr(torch, recipe.model.dtype))


def held_out_rows(source: MergeSource, file: str | None) -> list[list[int]]:
    """Return token ids of rows that a merged model is compared on: of `file`, else the run's own held-out rows.

    Raises:
        RecipeError: neither is there.
        DataError: the rows cannot be read.
    """
    recipe = recipe_of(source.adapter)
    if file is None and (recipe is None or not recipe.data.eval):
        raise adapter_mistake(
            source.adapter,
            "no held-out rows to compare the merged model on"
            + ("" if recipe is None else ": the run's recipe has no [[data.eval]]"),
            "--rows FILE (any file that a recipe takes), or --rows none to leave the comparison out",
        )
    own = DataTable(
        max_length=_LONGEST, packing=False, loss_on="all", train=(TrainSourceTable(path=file or "-"),)
    ) if recipe is None else recipe.data  # fmt: skip
    sources = own.eval if file is None else (SourceTable(path=file),)
    holder = next(
        (
            place
            for place in (source.adapter, source.tokenizer, source.base)
            if place is not None and has_tokenizer(place)
        ),
        None,
    )
    if holder is None:
        raise DataError(
            f"no tokenizer in {source.adapter} or {source.base}  copy tokenizer.json into the base's folder"
        )
    table = own.model_copy(update={"eval": ()})
    sources = tuple(each.model_copy(update={"max_rows": min(each.max_rows or MAX_ROWS, MAX_ROWS)}) for each in sources)
    prepared = prepare(table, sources, split="eval", tokenizer=str(holder), cache_dir=cache_folder(table))
    return documents(prepared)


def documents(prepared: Prepared) -> list[list[int]]:
    """Return the token ids of every document."""
    found: list[list[int]] = []
    for row in range(prepared.num_rows):
        ids: Any = prepared.row(row)[0]
        begin = 0
        for length in prepared.documents(row):
            found.append([int(token) for token in ids[begin : begin + length]])
            begin += length
    return found


def find_places(sources: Sequence[str], base: str | None) -> tuple[list[Path], Path, TrainedIn4bit | None]:
    """Return the folders, the one base of all, and how their runs had it in 4 bits.

    Raises:
        RecipeError: they have different bases, or none is known.
    """
    places, bases, kinds = [], {}, []
    for text in sources:
        place = find_place(text)
        places.append(place)
        if is_model(place):
            if base is None:
                raise adapter_mistake(
                    text, "is a whole model, whose change is known from its base alone", "--base MODEL"
                )
            continue
        found = find_source(text, base)
        bases[found.base.resolve()] = text
        kinds.append(found.in_4bit)
    if base is not None:
        bases = {base_folder(base, "--base", None): base}
    if len(bases) > 1:
        named = "; ".join(f"{text}: {folder}" for folder, text in bases.items())
        raise adapter_mistake(
            "adapters combine", f"they have different bases ({named})", "--base MODEL, if they are one"
        )
    same = kinds and all(kind == kinds[0] for kind in kinds) and len(kinds) == len(places)
    return places, next(iter(bases)), kinds[0] if same else None
