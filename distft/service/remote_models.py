"""Models that a vLLM server answers for: the base that it serves, and LoRA adapters of it, loaded when first asked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.errors import MachineError, Problem, RecipeError
from distft.core.files import read_json_object
from distft.core.tokenizer_files import load_tokenizer
from distft.export_formats.peft_adapter import broken_rules
from distft.export_formats.source import ModelSource, open_source, stop_ids
from distft.generation.completion import completion_of
from distft.generation.vllm_policy import PLAIN
from distft.generation.vllm_server import ServerGoneError, VllmServer
from distft.generation.vllm_stream import RefusedError, StreamingServer
from distft.routing.router import is_router
from distft.service.loaded_models import Served
from distft.service.tokenized_request import TokenizedRequest, token_entry

MOST_ADAPTERS, TIMEOUT_S = 32, 600.0
"""Adapters that a server has at a time (the one asked longest ago goes); seconds without a byte of an answer."""


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model under its name at a server, with the tokenizer that prompts are rendered by."""

    url: str
    key: str | None
    name: str
    served: Served
    longest: int | None
    """Positions that the server lets it read."""
    folder: str = ""
    """Of the adapter; "" of the base."""


class RemoteModels:
    """Finds models at servers, and asks them."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._known: OrderedDict[str, RemoteModel | None] = OrderedDict()

    def find(self, request: Mapping[str, Any]) -> RemoteModel | None:
        """Return the model of a request; None: it is neither the server's base nor a plain LoRA adapter of it.

        Not for several threads. `request["vllm"]` is `VllmSettings`, with the base's path as `base`.

        Raises:
            RecipeError: it cannot be loaded, or the server serves another base.
            MachineError: the server does not answer, or does not take the adapter.
        """
        given = request["given"]
        if given not in self._known:
            self._known[given] = self._look(given, request["vllm"])
        self._known.move_to_end(given)
        return self._known[given]

    def ask(self, model: RemoteModel, tokenized: TokenizedRequest) -> Iterator[dict[str, Any]]:
        """Yield the events of a request; an adapter that the server has forgotten is loaded again.

        Raises:
            RecipeError: the server refuses the request.
            MachineError: the server does not answer.
        """
        server = StreamingServer(url=model.url, timeout_s=TIMEOUT_S, key=model.key)
        answers = [_GrowingAnswer() for _ in tokenized.streams]
        for tries in range(2):
            try:
                for chunk in server.stream(_request(model, tokenized)):
                    for choice in chunk["choices"]:
                        answer = answers[choice["index"]]
                        for token in answer.take(choice):
                            yield from tokenized.piece(choice["index"], token)
                        if answer.finish is not None:
                            yield from answer.end(model, tokenized, choice["index"])
                return
            except ServerGoneError as error:
                if error.status != 404 or tries or not model.folder:
                    raise MachineError(f"the vLLM server has not answered: {error}") from error
                _load(model)
            except RefusedError as error:
                problem = Problem(message=f"the vLLM server refuses the request: {error}")
                raise RecipeError("prompt" if "prompt" in tokenized.request else "messages", [problem]) from None

    def _look(self, given: str, vllm: Mapping[str, Any]) -> RemoteModel | None:
        if given != vllm["base"] and is_router(Path(given).expanduser()):
            return None
        place = self._workdir / hashlib.sha256(given.encode()).hexdigest()[:16]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        source = open_source(given, place)
        if given != vllm["base"] and not _is_plain_lora(source):
            return None
        key = None
        if vllm["key_env"] is not None and not (key := os.environ.get(vllm["key_env"])):
            raise MachineError(f"[models.NAME.vllm] key_env: {vllm['key_env']} is not set or empty")
        card = _base_card(VllmServer(url=vllm["url"], timeout_s=TIMEOUT_S, key=key), vllm)
        tokenizer = load_tokenizer(source.folder)
        served = Served(tokenizer=tokenizer, stop_ids=stop_ids(source.folder, tokenizer))
        name, folder = card["id"], ""
        if given != vllm["base"]:
            digest = hashlib.sha256()
            for path in sorted(source.folder.glob("adapter_*")):
                digest.update(path.read_bytes())
            name, folder = f"distft-{digest.hexdigest()[:16]}", str(source.folder.resolve())
        model = RemoteModel(
            url=vllm["url"], key=key, name=name, served=served, longest=card.get("max_model_len"), folder=folder
        )
        if folder:
            self._make_room(model)
            _load(model)
        return model

    def _make_room(self, new: RemoteModel) -> None:
        theirs = [(given, model) for given, model in self._known.items() if model and model.folder]
        loaded = [(given, model) for given, model in theirs if model.url == new.url]
        if len(loaded) < MOST_ADAPTERS:
            return
        given, oldest = loaded[0]
        del self._known[given]
        if all(model.name != oldest.name for _, model in loaded[1:]):
            with contextlib.suppress(ServerGoneError):  # it has none of it, then
                VllmServer(url=oldest.url, timeout_s=TIMEOUT_S, key=oldest.key).drop_adapter(oldest.name)


class _GrowingAnswer:
    """One answer while its chunks come."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.finish: str | None = None
        self._logprobs: list[tuple[float, Mapping[str, float]]] = []

    def take(self, choice: Mapping[str, Any]) -> list[int]:
        """Take a chunk; return its tokens."""
        new: list[int] = list(choice.get("token_ids") or ())
        self.ids += new
        said = choice.get("logprobs")
        if said:
            tops = said.get("top_logprobs") or [{}] * len(said["token_logprobs"])
            self._logprobs += zip(said["token_logprobs"], tops, strict=True)
        self.finish = choice.get("finish_reason")
        return new

    def end(self, model: RemoteModel, tokenized: TokenizedRequest, index: int) -> list[dict[str, Any]]:
        """Return the events of its end.

        Raises:
            MachineError: it was broken off, or lacks what was asked for.
        """
        if self.finish not in ("stop", "length"):
            raise MachineError(f"the vLLM server has broken an answer off ({self.finish})")
        served, logprobs = model.served, None
        if tokenized.num_logprobs is not None:
            if len(self._logprobs) != len(self.ids):
                raise MachineError(f"{model.url}: an answer lacks log-probabilities")
            logprobs = [
                self._entry(served.tokenizer, token, *scored, tokenized.num_logprobs)
                for token, scored in zip(self.ids, self._logprobs, strict=True)
                if token not in served.stop_ids
            ]
        made = completion_of(
            self.ids, (), ends_with_token=bool(self.ids) and self.ids[-1] in served.stop_ids,
            ended=self.finish == "stop", stop=tokenized.stop,
            decode=lambda ids: served.tokenizer.decode(ids, skip_special_tokens=True),
        )  # fmt: skip
        return tokenized.end(index, made, logprobs)

    def _entry(
        self, tokenizer: Any, token: int, logprob: float, tops: Mapping[str, float], most: int
    ) -> dict[str, Any]:
        likeliest = sorted(tops.items(), key=lambda entry: -entry[1])[:most]
        ids = [(int(name.removeprefix("token_id:")), value) for name, value in likeliest]
        return token_entry(tokenizer, token, logprob) | {
            "top_logprobs": [token_entry(tokenizer, top, value) for top, value in ids]
        }


def _request(model: RemoteModel, tokenized: TokenizedRequest) -> dict[str, Any]:
    """Return a request that leaves nothing to the server's own defaults.

    Raises:
        RequestError: the prompt leaves too little room.
    """
    request = tokenized.request
    asked = {
        "model": model.name, "prompt": tokenized.ids, "add_special_tokens": False, "n": request["n"],
        "max_tokens": tokenized.room(model.longest), "temperature": request["temperature"], "top_p": request["top_p"],
        **PLAIN,
        "seed": request["seed"], "stop": list(tokenized.stop), "stop_token_ids": list(model.served.stop_ids),
        "ignore_eos": True,
    }  # fmt: skip
    if tokenized.num_logprobs is not None:
        asked["logprobs"] = tokenized.num_logprobs
    if tokenized.schema is not None:
        asked["structured_outputs"] = {"json": tokenized.schema}
    return asked


def _base_card(server: VllmServer, vllm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the server says of the base.

    Raises:
        MachineError: it does not answer.
        RecipeError: it serves another.
    """
    try:
        cards = [card for card in server.call("GET", "/v1/models")["data"] if not card.get("parent")]
    except ServerGoneError as error:
        raise MachineError(f"the vLLM server at {vllm['url']} has not answered: {error}") from error
    finally:
        server.close()
    for card in cards:
        is_base = card["id"] == vllm["model"] if vllm["model"] else _same(card.get("root") or "", vllm["base"])
        if is_base:
            return card
    serves = ", ".join(f"{card['id']} ({card.get('root')})" for card in cards)
    fix = f"set model to what serves it; allowed: {', '.join(card['id'] for card in cards)}"
    problem = Problem(message=f"the server at {vllm['url']} serves {serves}, not {vllm['base']}", fix=fix)
    raise RecipeError("[models.NAME.vllm]", [problem])


def _same(root: str, base: str) -> bool:
    return root == base or (Path(root).exists() and Path(root).resolve() == Path(base).expanduser().resolve())


def _load(model: RemoteModel) -> None:
    """Let the server read the adapter, if it has none of this name.

    Raises:
        MachineError: it does not answer, or does not take it.
    """
    server = VllmServer(url=model.url, timeout_s=TIMEOUT_S, key=model.key)
    try:
        if model.name not in server.models():
            server.load_adapter(model.name, model.folder)
    except ServerGoneError as error:
        raise MachineError(f"the vLLM server at {model.url} has not answered: {error}") from error
    finally:
        server.close()


def _is_plain_lora(source: ModelSource) -> bool:
    """Return whether vLLM computes this adapter as PEFT does: it knows LoRA, without these additions."""
    if not source.is_adapter or source.kind != "text":
        return False
    config = read_json_object(source.folder / "adapter_config.json")
    is_lora = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    return is_lora and not config.get("trainable_token_indices") and not any(broken_rules(source.folder))
