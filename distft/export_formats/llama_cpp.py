"""The door to llama.cpp: its server in this process (xllamacpp, a prebuilt wheel), asked over the loopback device."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import math
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.errors import MachineError
from distft.core.optional import why_not

PACKAGE = "xllamacpp"
INSTALL = f"pip install 'distft[export]' brings {PACKAGE}"
TIMEOUT_S = 600.0
MOST_LOGPROBS = 4096
"""Each is a piece of JSON: 150,000 of them take the server a second a position."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What llama.cpp wrote behind a prompt."""

    ids: tuple[int, ...]
    """With the token that ended it, where it says so."""
    ended: bool
    """Whether one of its own end tokens ended it."""


def missing() -> str:
    """Return why llama.cpp cannot be asked here; "" where it can."""
    return why_not(PACKAGE)


def version() -> str:
    """Return the binding and its version."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


class LlamaCpp:
    """A model file in llama.cpp: caches in fp32, no flash attention, so that only weights differ."""

    def __init__(self, address: str) -> None:
        self._host = urllib.parse.urlsplit(address).netloc
        self._letter = self.tokenize("a", special=False)[-1]

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of a text; special tokens written in it are read as such, as transformers does."""
        asked = {"content": text, "add_special": special, "parse_special": True}
        return list(self._ask("/tokenize", asked)["tokens"])

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the prompt that asks for the assistant's next turn."""
        return str(self._ask("/apply-template", {"messages": list(messages)})["prompt"])

    def greedy(self, ids: Sequence[int], most: int, *, forced: int | None = None) -> Generated:
        """Return the likeliest continuation of these tokens; `forced`: the token that every step has to write."""
        asked: dict[str, Any] = {"prompt": list(ids), "n_predict": most, "temperature": 0.0, "top_k": 1}
        asked |= {"return_tokens": True, "cache_prompt": False, "samplers": ["top_k"]}
        if forced is not None:
            asked["logit_bias"] = [[forced, 1000.0]]
        answer = self._ask("/completion", asked)
        return Generated(ids=tuple(answer["tokens"]), ended=answer["stop_type"] == "eos")

    def next_logprobs(self, ids: Sequence[int], vocabulary: int) -> dict[int, float]:
        """Return the log-probability of every token behind these; of a large vocabulary of the likeliest alone."""
        vocabulary = min(vocabulary, MOST_LOGPROBS)
        asked: dict[str, Any] = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "n_probs": vocabulary}
        # Probabilities are taken before the bias. The server leaves them out behind an end token or half a character.
        asked |= {"cache_prompt": True, "logit_bias": [[self._letter, 1000.0]]}
        answer = self._ask("/completion", asked)
        named = answer["completion_probabilities"][0]["top_logprobs"]
        # A number that JSON has no form for comes as null: a broken file, which the comparison has to see.
        return {entry["id"]: math.nan if entry["logprob"] is None else entry["logprob"] for entry in named}

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MachineError(f"llama.cpp gave no answer at {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise MachineError(f"llama.cpp refused {path}: {content.get('error', content)}")
        return content


@contextmanager
def loaded(file: Path, *, context: int) -> Iterator[LlamaCpp]:
    """Load a GGUF file and give the server that answers for it.

    Raises:
        MachineError: there is no binding, or llama.cpp cannot load the file.
    """
    if reason := missing():
        raise MachineError(f"{reason}  {INSTALL}")
    import torch
    import xllamacpp

    binding: Any = xllamacpp
    params: Any = binding.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = context, 1
    params.cache_type_k = params.cache_type_v = binding.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = binding.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # Its threads wait by spinning: more of them than torch may use would keep each other from the cores.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    params.warmup = params.ui = params.fit_params = False
    params.port = 0
    try:
        server = binding.Server(params)
    except Exception as error:  # the binding raises RuntimeError and its own kinds for a file that it cannot load
        raise MachineError(f"{file.name}: llama.cpp cannot load it: {error}") from error
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
