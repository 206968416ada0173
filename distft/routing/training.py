"""Trains a router on rows that are labelled by the adapter they belong to, and measures it on held-out ones."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.core.errors import DataError, NumericError, Problem, RecipeError
from distft.model.adapters.pool import AdapterPool
from distft.routing.features import arrow_prototypes, arrow_similarities, request_features, token_features
from distft.routing.router import CONFIG, FIRST, RouterWeights, adapter_digest, open_pool, write_router
from distft.routing.router_recipe import RoutedAdapter, RouterRecipe, RouterTable


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of an adapter: its request, and what it is answered with."""

    ids: tuple[int, ...]
    request: int
    """Tokens of the request, which come first."""

    @property
    def asked(self) -> tuple[int, ...]:
        """The request alone."""
        return self.ids[: self.request]

    @property
    def positions(self) -> list[int]:
        """Where a choice for each token looks: behind the request, and behind tokens of the answer, spread over it."""
        places = range(self.request - 1, max(self.request, len(self.ids) - 1))
        stride = max(1, len(places) // POSITIONS)
        return list(places[::stride][:POSITIONS])


Rows = list[Row]
Say = Callable[[str], None]
POSITIONS = 8
"""Of a row that a router of tokens is trained on and measured at."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Layers that `layer = "auto"` looks at, all in one forward."""


def train_router(recipe: RouterRecipe, source: str, say: Say, *, min_accuracy: float | None = None) -> dict[str, Any]:
    """Train a router, write its folder, and return router.json.

    Args:
        recipe: what to train.
        source: the recipe's file, for messages.
        say: told how it goes.
        min_accuracy: least accuracy on held-out rows.

    Raises:
        RecipeError: an adapter is not there, has another base, or has no rows; or the folder is there already.
        NumericError: it chooses worse than `min_accuracy`; no folder is left.
    """
    from distft.merging.base_model import base_hashes
    from distft.merging.folder_writer import refuse_existing, whole_folder
    from distft.model.adapters.whole import base_of

    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    folders = {adapter.name: _folder(adapter, source) for adapter in recipe.adapters}
    refuse_existing(recipe.folder, *folders.values())
    train, held_out = {}, {}
    for adapter in recipe.adapters:
        train[adapter.name], held_out[adapter.name] = _rows(adapter, folders[adapter.name], recipe, source)
    shared = _refuse_same(train, source)
    pool = open_pool(folders, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    names = list(folders)
    num_rows = {label: sum(map(len, rows.values())) for label, rows in (("train", train), ("held out", held_out))}
    say(f"{num_rows['train']:,} requests of {len(names)} adapters, {num_rows['held out']:,} held out")
    arrow = _arrow(pool, names, held_out)
    how, weights, losses, figures = recipe.router, None, [], arrow
    if how.classifier == "trained":
        how, weights, losses, figures = _trained(pool, names, train, held_out, how, recipe.seed)
        say(_line("router", figures))
    say(_line("Arrow, not trained", arrow))
    if min_accuracy is not None and figures["accuracy"] < min_accuracy:
        raise NumericError(
            f"the router chooses right in {figures['accuracy']:.1%} of {figures['num_rows']} held-out requests, less "
            f"than --min-accuracy {min_accuracy:g}; nothing was kept  fix: rows whose requests say which adapter is "
            'meant, [router] hidden_size = 64, or pooling = "last"'
        )
    config = {
        "name": recipe.name,
        "base": str(base_of(folders[names[0]])),
        "router": how.model_dump(),
        "adapters": [
            {"name": name, "path": str(folder.resolve()), "sha256": adapter_digest(folder),
             "train_rows": len(train[name]), "held_out_rows": len(held_out[name])}
            for name, folder in folders.items()
        ],
        "held_out": figures,
        "arrow": arrow,
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "shared_requests": shared,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "cwd": str(Path.cwd()),
        "base_sha256": base_hashes(base_of(folders[names[0]])),
        "rows_sha256": {name: _rows_hash([*train[name], *held_out[name]]) for name in names},
        "seconds": round(time.monotonic() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("distft", "torch", "transformers", "peft")},
    }  # fmt: skip
    with whole_folder(recipe.folder, 1 << 20) as aside:
        write_router(aside, weights, config)
        from distft.core.tokenizer_files import load_tokenizer

        load_tokenizer(folders[names[0]]).save_pretrained(aside)
        generation = folders[names[0]] / "generation_config.json"
        if generation.is_file():
            (aside / generation.name).write_bytes(generation.read_bytes())
        config["files_sha256"] = made_hashes(aside)
        write_router(aside, weights, config)
    return config


def made_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a router's folder but router.json and what people write in."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (CONFIG, "README.md") and path.is_file():
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _rows_hash(rows: Rows) -> str:
    told = json.dumps([[row.ids, row.request] for row in rows])
    return hashlib.sha256(told.encode()).hexdigest()


def _trained(
    pool: AdapterPool,
    names: Sequence[str],
    train: Mapping[str, Rows],
    held_out: Mapping[str, Rows],
    how: RouterTable,
    seed: int,
) -> tuple[RouterTable, RouterWeights, list[float], dict[str, Any]]:
    """Return (settings with the layer that was chosen, weights, losses, figures on the held-out rows)."""
    layers = DEPTHS if how.layer == "auto" else (how.layer,)
    x_train, y_train, row_train = _labelled(pool, train, how, layers)
    x_held, y_held, row_held = _labelled(pool, held_out, how, layers)
    place = 0 if len(layers) == 1 else _best_layer(x_train, y_train, row_train, len(names), how, seed)
    how = how.model_copy(update={"layer": layers[place]})
    weights, losses = fit(x_train[:, place], y_train, len(names), how)
    chosen = weights.scores(x_held[:, place]).argmax(1)
    return how, weights, losses, _figures(chosen, y_held, names, row_held if how.per == "token" else None)


def _arrow(pool: AdapterPool, names: Sequence[str], held_out: Mapping[str, Rows]) -> dict[str, Any]:
    """Return how often Arrow chooses right, request by request."""
    prototypes = {names[0] if name == FIRST else name: value for name, value in arrow_prototypes(pool).items()}
    similar = [arrow_similarities(pool, prototypes, [row.asked for row in held_out[name]]) for name in names]
    labels = torch.cat([torch.full((len(held_out[name]),), place) for place, name in enumerate(names)])
    return _figures(torch.cat(similar).argmax(1), labels, names)


def _line(label: str, found: Mapping[str, Any]) -> str:
    low, high, per = found["low"], found["high"], found["per"]
    rows = found["num_rows"]
    counted = f"{rows}" if per == "request" else f"the tokens of {rows}"
    return f"{label}: chooses right in {found['accuracy']:.1%} of {counted} [{low:.1%}, {high:.1%}]"


def fit(features: Tensor, labels: Tensor, num_adapters: int, how: RouterTable) -> tuple[RouterWeights, list[float]]:
    """Train the classifier on all rows at once; every adapter counts the same, however many rows it has.

    Args:
        features: [rows, D].
        labels: [rows], places of adapters.
        num_adapters: N.
        how: steps, learning rate, units between.

    Raises:
        NumericError: the loss was not finite.
    """
    mean_D, spread_D = features.mean(0), features.std(0).clamp(min=1e-6)
    width = features.shape[1]
    units = how.hidden_size or width
    hidden_HD = torch.randn(units, width).mul_(width**-0.5).requires_grad_() if how.hidden_size else None
    hidden_H = torch.zeros(units).requires_grad_() if how.hidden_size else None
    score_NH, score_N = torch.zeros(num_adapters, units).requires_grad_(), torch.zeros(num_adapters).requires_grad_()
    made = RouterWeights(
        mean_D=mean_D, spread_D=spread_D, hidden_HD=hidden_HD, hidden_H=hidden_H, score_NH=score_NH, score_N=score_N
    )
    params = [param for param in (hidden_HD, hidden_H, score_NH, score_N) if param is not None]
    optimizer = torch.optim.AdamW(params, lr=how.learning_rate, weight_decay=how.weight_decay)
    counts_N = torch.bincount(labels, minlength=num_adapters).float()
    losses = []
    for _ in range(how.num_steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(made.scores(features), labels, weight=1.0 / counts_N)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise NumericError("the router's loss is not finite  fix: a smaller [router] learning_rate")
    tensors = {name: value.detach() for name, value in made.tensors().items()}
    return RouterWeights(**{"hidden_HD": None, "hidden_H": None} | tensors), losses  # pyright: ignore[reportArgumentType]


def _best_layer(features: Tensor, labels: Tensor, row: Tensor, num_adapters: int, how: RouterTable, seed: int) -> int:
    """Return the place of the layer, of [places, layers, D], that chooses best on a fifth of the rows."""
    order = torch.randperm(int(row.max()) + 1, generator=torch.Generator().manual_seed(seed))
    is_tried = torch.isin(row, order[: len(order) // 5])
    tried, fitted = is_tried.nonzero().flatten(), (~is_tried).nonzero().flatten()
    best, most = 0, -1
    for place in range(features.shape[1]):
        weights, _ = fit(features[fitted, place], labels[fitted], num_adapters, how)
        right = int((weights.scores(features[tried, place]).argmax(1) == labels[tried]).sum())
        if right >= most:
            best, most = place, right
    return best


def _labelled(
    pool: AdapterPool, rows: Mapping[str, Rows], how: RouterTable, layers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [places, layers, D], the adapter of each place, and the row that it belongs to."""
    about: Any = {"layers": layers, "pooling": how.pooling}
    features, labels, owners = [], [], []
    for label, own in enumerate(rows.values()):
        if how.per == "token":
            features.append(token_features(pool, [(row.ids, row.positions) for row in own], **about))
            counts = torch.tensor([len(row.positions) for row in own])
        else:
            features.append(request_features(pool, [row.asked for row in own], **about))
            counts = torch.ones(len(own), dtype=torch.long)
        labels.append(torch.full((len(features[-1]),), label))
        owners.append(
            torch.repeat_interleave(torch.arange(len(own)), counts) + sum(map(len, list(rows.values())[:label]))
        )
    return torch.cat(features), torch.cat(labels), torch.cat(owners)


def _figures(chosen: Tensor, labels: Tensor, names: Sequence[str], row: Tensor | None = None) -> dict[str, Any]:
    """Return the share of right choices with its interval, and the table; `row`: the row of each place, of tokens.

    Places of one row are not independent: there the interval is that of rows' own shares.
    """
    from distft.scores.confidence_intervals import of_mean, of_share

    right = chosen == labels
    if row is None:
        interval = of_share(int(right.sum()), len(labels))
    else:
        shares = torch.zeros(int(row.max()) + 1).index_add_(0, row, right.float()) / torch.bincount(row)
        interval = of_mean(shares.tolist())
    table = {
        name: {
            other: int(((labels == place) & (chosen == other_place)).sum()) for other_place, other in enumerate(names)
        }
        for place, name in enumerate(names)
    }
    return {
        "per": "request" if row is None else "token", "accuracy": interval.value, "low": interval.low,
        "high": interval.high, "num_rows": interval.num_rows, "chosen": table,
    }  # fmt: skip


def _folder(adapter: RoutedAdapter, source: str) -> Path:
    place = Path(adapter.path).expanduser()
    place = place / "final" if (place / "final" / "adapter_config.json").is_file() else place
    if not (place / "adapter_config.json").is_file():
        problem = f'[[adapters]] {adapter.name}: path = "{adapter.path}" holds no adapter'
        raise RecipeError(source, [Problem(message=problem, fix="a run that trained one, or a folder in PEFT's form")])
    return place


def _rows(adapter: RoutedAdapter, folder: Path, recipe: RouterRecipe, source: str) -> tuple[Rows, Rows]:
    """Return (training, held-out) rows of an adapter.

    Raises:
        RecipeError: it has no rows.
        DataError: they cannot be read.
    """
    from distft.adapter_sources import recipe_of
    from distft.recipe.evaluation import SourceTable
    from distft.recipe.schema import DataTable, TrainSourceTable

    run = recipe_of(folder.resolve())
    if adapter.rows is None and run is None:
        problem = f"[[adapters]] {adapter.name}: belongs to no run, and has no rows"
        raise RecipeError(source, [Problem(message=problem, fix="rows = FILE")])
    plain = DataTable(max_length=4096, packing=False, train=(TrainSourceTable(path=adapter.rows or "-"),))
    table = plain if run is None or adapter.rows is not None else run.data

    def read(given: str | None, own: Sequence[Any]) -> Rows:
        sources = tuple(own) if given is None else (SourceTable(path=given),)
        return _prepared(table, sources, folder, adapter)

    train = read(adapter.rows, () if run is None else run.data.train)
    if adapter.eval_rows is not None or (adapter.rows is None and run is not None and run.data.eval):
        held_out = read(adapter.eval_rows, () if run is None else run.data.eval)
        seen = {row.asked for row in train}
        held_out = [row for row in held_out if row.asked not in seen]
    else:
        unique = list({row.asked: row for row in reversed(train)}.values())[::-1]  # the first of each
        random.Random(f"{recipe.seed} {adapter.name}").shuffle(unique)
        count = max(1, round(recipe.router.held_out_share * len(unique)))
        held_out, train = unique[:count], unique[count:]
    if not train or not held_out:
        raise DataError(
            f"[[adapters]] {adapter.name}: {len(train)} requests to train on and {len(held_out)} others held out  "
            "fix: more rows, or eval_rows of their own"
        )
    return train, held_out


def _prepared(table: Any, sources: Sequence[Any], folder: Path, adapter: RoutedAdapter) -> Rows:
    """Return rows with what comes before the first trained token as their request."""
    from distft.data.prepare import prepare
    from distft.data.prepared_folder import cache_folder

    limited = [
        each.model_copy(update={"max_rows": min(each.max_rows or adapter.max_rows, adapter.max_rows)})
        for each in sources
    ]
    alone = table.model_copy(update={"packing": False, "eval": ()})
    prepared = prepare(alone, tuple(limited), split="eval", tokenizer=str(folder), cache_dir=cache_folder(alone))
    found: Rows = []
    for number in range(prepared.num_rows):
        ids, trained = prepared.row(number)
        first = int(trained.argmax()) if trained.any() else len(ids)
        found.append(Row(ids=tuple(int(token) for token in ids), request=first or len(ids)))
    return found[: adapter.max_rows]


def _refuse_same(train: Mapping[str, Rows], source: str) -> int:
    """Return how many requests belong to two adapters.

    Raises:
        RecipeError: all of an adapter's belong to another as well: nothing in them says which one is meant.
    """
    shared = 0
    for name, rows in train.items():
        others = {row.asked for other, more in train.items() if other != name for row in more}
        same = sum(row.asked in others for row in rows)
        if same == len(rows):
            problem = f"[[adapters]] {name}: every request of its rows is another adapter's as well"
            fix = "rows whose requests say which adapter is meant"
            raise RecipeError(source, [Problem(message=problem, fix=fix)])
        shared += same
    return shared
