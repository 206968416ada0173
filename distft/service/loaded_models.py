"""The models that are in memory for answers: bases with adapters beside them, and models that were trained whole."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.chat.models import inference_device, inference_dtype, load_whole
from distft.core.errors import Problem, RecipeError
from distft.core.files import read_json_object
from distft.core.tokenizer_files import load_tokenizer
from distft.export_formats.source import ModelSource, open_source, stop_ids
from distft.generation.grammar import JsonGrammars
from distft.routing.router import RoutedPool, is_router
from distft.service.tool_calls import ToolChats

MOST_WHOLE, MOST_ADAPTERS = 2, 32
"""Kept in memory; the one that was asked longest ago goes."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model with its tokenizer."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    whole: Any = None
    """transformers' model, where it is no adapter."""
    routed: Any = None
    """A `RoutedPool`, where a router chooses an adapter for each request or token; `whole` is its model."""
    base: str = ""
    """The adapter's base."""
    adapter: str = ""
    """Its name in the pool."""

    @functools.cached_property
    def grammars(self) -> JsonGrammars:
        """Made once: it reads the whole vocabulary."""
        return JsonGrammars(self.tokenizer, self.stop_ids)

    @property
    def chooses_by_token(self) -> bool:
        """Whether a router chooses anew for each token of an answer."""
        return self.routed is not None and self.routed.how.per == "token"


class LoadedModels:
    """Loads on first use. Not for several threads."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._pools: dict[str, Any] = {}
        self._number = 0

    def get(self, given: str) -> Served:
        """Return the model of a run, a checkpoint or a folder.

        Raises:
            DistftError: it cannot be loaded.
        """
        if given in self._served:
            self._served.move_to_end(given)
            return self._served[given]
        if is_router(Path(given).expanduser()):
            self._served[given] = self._load_router(Path(given).expanduser())
            return self._served[given]
        # a place of its own: checkpoints of two jobs have the same name, and an earlier server may have left one
        place = self._workdir / hashlib.sha256(given.encode()).hexdigest()[:16]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        source = open_source(given, place)
        if source.kind == "reward":
            raise _mistake(given, "a reward model gives a number and writes no text")
        tokenizer = load_tokenizer(source.folder)
        ends = stop_ids(source.folder, tokenizer)
        if source.is_adapter:
            base, adapter = self._load_adapter(source)
            served = Served(tokenizer=tokenizer, stop_ids=ends, base=base, adapter=adapter)
        else:
            if not any(source.folder.glob("*.safetensors")) and not any(source.folder.glob("*.bin")):
                raise _mistake(given, "has no weights: jobs start it from random ones")
            self._make_room(whole=True, base="")
            served = Served(tokenizer=tokenizer, stop_ids=ends, whole=load_whole(source.folder))
        self._served[given] = served
        return served

    @contextlib.contextmanager
    def using(self, served: Served, asked: Sequence[int]) -> Iterator[Any]:
        """Give the module that computes as this model does for a request of these tokens."""
        if served.routed is not None and not served.chooses_by_token:
            with served.routed.using(served.routed.choose(asked)) as lm:
                yield lm
            return
        if served.whole is not None:
            yield served.whole
            return
        with self._pools[served.base].using(served.adapter) as lm:
            yield lm

    def _load_router(self, folder: Path) -> Served:
        self._make_room(whole=True, base="")
        routed = RoutedPool(folder, dtype=inference_dtype(), device=inference_device())
        tokenizer = load_tokenizer(folder)
        ends = stop_ids(folder, tokenizer)
        return Served(tokenizer=tokenizer, stop_ids=ends, whole=routed.pool.model, routed=routed)

    def _load_adapter(self, source: ModelSource) -> tuple[str, str]:
        from distft.model.adapters.pool import FIRST, AdapterPool

        base = str(read_json_object(source.folder / "adapter_config.json").get("base_model_name_or_path", ""))
        if base not in self._pools:
            self._pools[base] = AdapterPool(source.folder, dtype=inference_dtype()).to(inference_device())
            return base, FIRST
        self._make_room(whole=False, base=base)
        self._number += 1
        name = f"adapter{self._number}"
        self._pools[base].add(name, source.folder)
        return base, name

    def _make_room(self, *, whole: bool, base: str) -> None:
        kept = [
            given
            for given, served in self._served.items()
            if (served.whole is not None) == whole and served.base == base
        ]
        if len(kept) < (MOST_WHOLE if whole else MOST_ADAPTERS):
            return
        oldest = self._served.pop(kept[0])
        if not whole:
            self._pools[base].remove(oldest.adapter)


def prompt_ids(served: Served, request: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a request's prompt.

    Raises:
        RecipeError: the model has no chat template, or the template refuses the messages.
    """
    tokenizer = served.tokenizer
    if "ids" in request:
        size = len(tokenizer)
        if not all(0 <= token < size for token in request["ids"]):
            raise _mistake("prompt", f"has tokens outside of the vocabulary of {size}")
        return list(request["ids"])
    if "prompt" in request:
        return list(tokenizer(request["prompt"])["input_ids"])
    template = request.get("template") or tokenizer.chat_template
    if not template:
        raise _mistake("messages", "this model has no chat template: ask it at /v1/completions")
    if request.get("speaks_of_tools"):
        text = ToolChats(tokenizer, template).render(request["messages"], request.get("tools"))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            request["messages"], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise _mistake("messages", f"the model's chat template refuses them: {error}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _mistake(given: str, message: str) -> RecipeError:
    return RecipeError(given, [Problem(message=message)])
