"""The models of a chat: one base in memory, adapters beside it, and the generator that answers for the one chosen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distft.core.errors import Problem, RecipeError
from distft.core.files import read_json_object
from distft.export_formats.source import ModelSource, open_source, stop_ids
from distft.generation.completion import Prompt, SamplingParams

if TYPE_CHECKING:
    from distft.model.adapters.pool import AdapterPool
    from distft.routing.router import RoutedPool

TUNED, BASE = "tuned", "base"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer."""

    model: str
    text: str
    num_tokens: int
    ended: bool
    """Whether it ended by itself, not by the limit."""
    seconds: float
    chosen: str = ""
    """The adapter, or adapters, that a router chose for it."""


class ChatModels:
    """Named models that share a tokenizer; the source's own is `tuned`, what it was trained from `base`."""

    def __init__(self, given: str, adapters: Mapping[str, Path], workdir: Path, *, with_base: bool) -> None:
        """Load the source, its adapters, and its base where that is another model.

        Args:
            given: a run, a checkpoint, or a folder of a model or adapter.
            adapters: name -> folder of further adapters of the same base.
            workdir: where a checkpoint is put together.
            with_base: whether the base is asked as well.

        Raises:
            RecipeError: there is no such model, it writes no text, or an adapter does not fit the base.
        """
        from distft.core.tokenizer_files import load_tokenizer

        self._routed: RoutedPool | None = None
        self._pool: AdapterPool | None = None
        self._modules: dict[str, Any] = {}
        self._adapter_of: dict[str, str | None] = {}
        from distft.routing.router import is_router

        if is_router(Path(given).expanduser()):
            self._load_router(Path(given).expanduser(), adapters)
            self.names = tuple(self._modules)
            return
        source = open_source(given, workdir)
        if source.kind == "reward":
            raise _mistake(given, "a reward model gives a number and writes no text", "chat with the policy")
        self.tokenizer: Any = load_tokenizer(source.folder)
        self._stop_ids = stop_ids(source.folder, self.tokenizer)
        self._load(source, adapters, with_base=with_base)
        self.names = tuple(self._modules)

    def _load_router(self, folder: Path, adapters: Mapping[str, Path]) -> None:
        """Load what a router chooses among: `tuned` is its choice, and each adapter can be asked by its name."""
        from distft.core.tokenizer_files import load_tokenizer
        from distft.routing.router import RoutedPool

        if adapters:
            fix = "train a router that knows it"
            raise _mistake(str(folder), "is a router, and --adapter is for the base of one adapter", fix)
        routed = self._routed = RoutedPool(folder, dtype=inference_dtype(), device=inference_device())
        self.tokenizer = load_tokenizer(folder)
        self._stop_ids = stop_ids(folder, self.tokenizer)
        self._pool = routed.pool
        inside: dict[str, str | None] = {name: routed.inside(name) for name in routed.names}
        self._adapter_of = {TUNED: None, BASE: None} | inside
        self._modules = dict.fromkeys(self._adapter_of, routed.pool.model)

    def _load(self, source: ModelSource, adapters: Mapping[str, Path], *, with_base: bool) -> None:
        from distft.model.adapters.pool import FIRST, AdapterPool

        if source.is_adapter:
            pool = self._pool = AdapterPool(source.folder, dtype=inference_dtype()).to(inference_device())
            self._modules |= {TUNED: pool.model, BASE: pool.model}
            self._adapter_of |= {TUNED: FIRST, BASE: None}
            for name, folder in adapters.items():
                pool.add(name, folder)
                self._modules[name], self._adapter_of[name] = pool.model, name
            return
        if adapters:
            fix = "give the run of an adapter, or the folder of one"
            raise _mistake(source.given, "is a whole model, and --adapter goes beside the base of another adapter", fix)
        self._modules[TUNED] = load_whole(source.folder)
        if with_base:
            self._modules[BASE] = load_whole(_base_folder(source))

    def reply(
        self, name: str, messages: Sequence[Mapping[str, str]], how: SamplingParams, say: Callable[[str], None]
    ) -> Reply:
        """Return the answer of one model; `say` is given each piece of its text as soon as it is written."""
        from distft.generation.local import local_generator

        text = TextPieces(self.tokenizer, self._stop_ids, say)
        asked = self._ids(messages)
        if self._routed is not None and name == TUNED and self._routed.how.per == "token":
            return self._reply_by_tokens(asked, messages, how, text)
        chosen = self._routed.choose(asked) if self._routed is not None and name == TUNED else None
        with self._turned_on(name, chosen) as lm:
            generator = local_generator(lm, self.tokenizer, self._stop_ids, heard=text.hear)
            ids = generator.truncate_prompt(asked, how.max_new_tokens)
            began = time.monotonic()
            made = generator.generate([Prompt(seed_key=f"{name} {len(messages)}", ids=ids)], how)
        assert made is not None
        text.finish(made[0].text)
        seconds = time.monotonic() - began
        return Reply(
            model=name, text=made[0].text, num_tokens=made[0].num_tokens, ended=made[0].ended, seconds=seconds,
            chosen="" if chosen is None else "+".join(chosen) or BASE,
        )  # fmt: skip

    def _reply_by_tokens(
        self, asked: list[int], messages: Sequence[Mapping[str, str]], how: SamplingParams, text: TextPieces
    ) -> Reply:
        """Return an answer whose tokens each have their own choice; `chosen` says how many each has written."""
        from distft.generation.local import local_generator
        from distft.routing.token_generator import TokenRoutedGenerator

        assert self._routed is not None
        generator = TokenRoutedGenerator(self._routed, self.tokenizer, self._stop_ids, heard=text.hear)
        whole = local_generator(self._routed.pool.model, self.tokenizer, self._stop_ids)
        ids = whole.truncate_prompt(asked, how.max_new_tokens)
        made = generator.generate([Prompt(seed_key=f"{TUNED} {len(messages)}", ids=ids)], how)
        assert made is not None
        text.finish(made[0].text)
        counts = sorted(generator.chosen.items(), key=lambda pair: -pair[1])
        chosen = ", ".join(f"{label} {count}" for label, count in counts) if len(counts) > 1 else counts[0][0]
        return Reply(
            model=TUNED, text=made[0].text, num_tokens=made[0].num_tokens, ended=made[0].ended,
            seconds=generator.seconds, chosen=chosen,
        )  # fmt: skip

    def _ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self.tokenizer.chat_template:  # a model of plain text: what was written last is the prompt
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextlib.contextmanager
    def _turned_on(self, name: str, chosen: Mapping[str, float] | None) -> Iterator[Any]:
        if chosen is not None:
            assert self._routed is not None
            with self._routed.using(chosen) as lm:
                yield lm
            return
        if name not in self._adapter_of:
            yield self._modules[name]
            return
        assert self._pool is not None
        with self._pool.using(self._adapter_of[name]) as lm:
            yield lm


class TextPieces:
    """Turns tokens into pieces of text; half a character waits for its other half."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], say: Callable[[str], None]) -> None:
        self._tokenizer, self._stop_ids, self._say = tokenizer, stop_ids, say
        self._ids: list[int] = []
        self._said = ""

    def hear(self, row: int, token: int) -> None:
        """Take the next token."""
        if token in self._stop_ids:
            return
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self._said):
            self._say(text[len(self._said) :])
            self._said = text

    def finish(self, text: str) -> None:
        """Say what is left of the whole text."""
        if text.startswith(self._said) and text != self._said:
            self._say(text[len(self._said) :])


def load_whole(folder: Path) -> Any:
    """Return a model that is no adapter, on this machine's device.

    Raises:
        DataError: transformers cannot load it.
    """
    import transformers

    from distft.core.errors import DataError

    try:
        loader: Any = transformers.AutoModelForCausalLM
        return (
            loader.from_pretrained(folder, dtype=inference_dtype(), local_files_only=True).to(inference_device()).eval()
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: transformers cannot load it: {(str(error).splitlines() or [''])[0]}") from error


def _base_folder(source: ModelSource) -> Path:
    """Return the folder of the model that a run started from."""
    model = read_json_object(source.run / "manifest.json").get("model") if source.run is not None else None
    named = (model or {}).get("folder")
    if not named or not any(Path(named).glob("*.safetensors")):
        why = "it belongs to no run" if source.run is None else f"its run started from {named}, which has no weights"
        raise _mistake(source.given, f"--base: {why}", "leave --base out")
    return Path(named)


def inference_device() -> str:
    """Return where models are asked: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def inference_dtype() -> torch.dtype:
    """Return the type of weights that models are asked in."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _mistake(given: str, message: str, fix: str) -> RecipeError:
    return RecipeError(f"distft chat {given}", [Problem(message=message, fix=fix)])
