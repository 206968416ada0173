"""A trained router: which adapter answers a request, by the base's hidden state.

Shape letters: D width of the model, H units between, N adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.core.errors import Problem, RecipeError
from distft.core.files import read_json_object
from distft.model.adapters.pool import FIRST, AdapterPool
from distft.routing.features import arrow_prototypes, arrow_similarities, request_features
from distft.routing.router_recipe import RouterTable

CONFIG, WEIGHTS = "router.json", "router.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """The classifier: hidden states brought to mean 0 and spread 1, one layer of units or none, a score each."""

    mean_D: Tensor
    spread_D: Tensor
    hidden_HD: Tensor | None
    hidden_H: Tensor | None
    score_NH: Tensor
    """[N, D] without units between."""
    score_N: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Return logits [requests, N] of features [requests, D]."""
        made = (features - self.mean_D) / self.spread_D
        if self.hidden_HD is not None and self.hidden_H is not None:
            made = torch.tanh(made @ self.hidden_HD.T + self.hidden_H)
        return made @ self.score_NH.T + self.score_N

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored."""
        return {name: value for name, value in vars(self).items() if value is not None}


def choice(probabilities: Tensor, names: Sequence[str], how: RouterTable) -> dict[str, float]:
    """Return the weight of each chosen adapter; empty: the base alone.

    Args:
        probabilities: [N].
        names: of the adapters.
        how: one or a mixture, and the least confidence.
    """
    if float(probabilities.max()) < how.min_confidence:
        return {}
    if how.choose == "one":
        return {names[int(probabilities.argmax())]: 1.0}
    top = probabilities.topk(min(how.top_k, len(names)))
    total = float(top.values.sum())
    return {names[int(place)]: float(value) / total for value, place in zip(top.values, top.indices, strict=True)}


class RoutedPool:
    """Adapters beside their base with the router that chooses among them."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> None:
        """Load a router's folder with everything it chooses among.

        Raises:
            RecipeError: it is no router, or an adapter is not the one that it was trained with.
        """
        from safetensors.torch import load_file

        self.config = read_json_object(folder / CONFIG)
        self.folder = folder
        try:
            entries = {str(entry["name"]): entry for entry in self.config["adapters"]}
            self.how = RouterTable(**self.config["router"])
            self._weights = None if self.how.classifier == "arrow" else _weights(load_file(folder / WEIGHTS))
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise _mistake(folder, f"is no whole router: {type(error).__name__}: {error}", "train it again") from None
        for name, entry in entries.items():
            if adapter_digest(Path(entry["path"])) != entry["sha256"]:
                raise _mistake(
                    folder, f"{name}: {entry['path']} is not the adapter that it was trained with", "train it again"
                )
        self.names = tuple(entries)
        self.pool = open_pool({name: Path(entry["path"]) for name, entry in entries.items()}, dtype, device)
        self._prototypes = arrow_prototypes(self.pool) if self._weights is None else {}

    @property
    def layer(self) -> float:
        """Depth of the base that is looked at, as a share of its layers."""
        assert self.how.layer != "auto", "what is stored names the layer"
        return self.how.layer

    def choose(self, ids: Sequence[int]) -> dict[str, float]:
        """Return the weight of each adapter that should answer these tokens; empty: the base."""
        if self._weights is None:
            similar_N = arrow_similarities(self.pool, self._prototypes, [ids])[0]
            return {self.names[int(similar_N.argmax())]: 1.0}  # prototypes are in the pool's order, which is ours
        features = request_features(self.pool, [ids], layers=[self.layer], pooling=self.how.pooling)
        return self.choose_by(features[0, 0])

    def choose_by(self, features_D: Tensor) -> dict[str, float]:
        """Return the weight of each adapter, of what is known at one position; empty: the base."""
        assert self._weights is not None, "Arrow chooses by whole requests"
        return choice(torch.softmax(self._weights.scores(features_D[None])[0], dim=0), self.names, self.how)

    def using(self, weights: Mapping[str, float]) -> Any:
        """Return the context in which the model computes with what `choose` said."""
        inside = {self.inside(name): weight for name, weight in weights.items()}
        if not inside:
            return self.pool.using(None)
        if len(inside) == 1:
            return self.pool.using(next(iter(inside)))
        return self.pool.mixing(inside)

    def inside(self, name: str) -> str:
        """Return the pool's name of an adapter."""
        return FIRST if name == self.names[0] else name


def _weights(tensors: Mapping[str, Tensor]) -> RouterWeights:
    fields = RouterWeights.__dataclass_fields__
    return RouterWeights(**{name: tensors.get(name) for name in fields})  # pyright: ignore[reportArgumentType]


def open_pool(folders: Mapping[str, Path], dtype: torch.dtype, device: str) -> AdapterPool:
    """Return a pool of adapters; the first one is called `FIRST` in it.

    Raises:
        RecipeError: they have different bases, or one cannot be loaded.
    """
    names = list(folders)
    pool = AdapterPool(folders[names[0]], dtype=dtype).to(device)
    for name in names[1:]:
        pool.add(name, folders[name])
    return pool


def is_router(folder: Path) -> bool:
    """Return whether `distft router train` wrote the folder."""
    return (folder / CONFIG).is_file()


def adapter_digest(folder: Path) -> str:
    """Return a sha256 of an adapter's config and tensors; "" where they are not there."""
    digest = hashlib.sha256()
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            return ""
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def write_router(folder: Path, weights: RouterWeights | None, config: Mapping[str, Any]) -> None:
    """Write a router into a folder that exists; weights None: it is not trained."""
    from safetensors.torch import save_file

    if weights is not None:
        save_file({name: value.contiguous() for name, value in weights.tensors().items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _mistake(folder: Path, message: str, fix: str) -> RecipeError:
    return RecipeError(str(folder), [Problem(message=message, fix=fix)])
