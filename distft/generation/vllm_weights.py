"""Gives a vLLM server the weights of a model that is trained whole, through files that both see. Imports no torch.

A push has three steps, each with its proof. The server's weights are set to zero, and its answers must be those of a
model of zeros: every token as likely as any other. Then it reads the files, which is why a read that did not happen
cannot be missed, however small the update was. Then it forgets keys and values of prompts, and its weights get the name
of their digest, which every answer says of every token.

Needs vLLM 0.32 in its development mode, whose endpoints (`vllm/entrypoints/rl/online/api_router.py` and
`vllm/entrypoints/serve/dev/rpc/api_router.py`) do what whoever reaches them says: addresses of the open internet are
refused.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distft.core.errors import MachineError, NumericError
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.vllm_policy import OURS, Probe, sampling
from distft.generation.vllm_server import PolicyRequest, ServerAnswer, ServerGoneError, VllmServer

AS_STARTED = "default"
"""What vLLM calls the weights that it was started with."""
NOTHING = OURS + "nothing"
"""Name of the weights while they are zero or being read."""
ZERO_TOKENS, ZERO_GAP = 2, 1e-3
"""Tokens that are asked of a model of zeros, and how far apart their log-probabilities may be."""
START = "start it with --enable-scale-out, and with VLLM_SERVER_DEV_MODE=1 in its environment (vLLM 0.32 or newer)"


class WeightsPolicy:
    """The weights of the server itself, under the name of their digest."""

    files = "*.safetensors"
    wrong = (
        "It has not read all of the weights (on CPUs, vLLM 0.32 keeps its old head where that is tied to the "
        "embedding: train and serve a base that stores both), or computes in another type than [model] dtype."
    )

    def __init__(self, server: VllmServer, write: Callable[[Path], None], stop_ids: Sequence[int]) -> None:
        """Keep where they are sent, what writes them, and the tokens that end an answer."""
        self.write, self._server, self._stop_ids = write, server, stop_ids

    def has(self, name: str) -> bool:
        """Return whether its weights have this name."""
        return weight_version(self._server) == name

    def push(self, name: str, folder: Path, probe: Probe) -> bool | None:
        """Let the server read the weights in `folder`; what it was answering is broken off."""
        refuse_public(self._server.url)
        self._pause()
        self._rename(NOTHING)
        self._post("/weight_checker", {"action": "reset"})
        self._forget()
        self._post("/resume")
        zeros = probe(NOTHING, ZERO_TOKENS)
        if zeros is None or isinstance(zeros, bool):
            return zeros
        self._refuse_weights(zeros)
        self._pause()
        self._read(folder)
        self._forget()
        self._rename(name)
        self._post("/resume")
        return True

    def request(self, name: str, prompt: Prompt, how: SamplingParams, max_tokens: int) -> PolicyRequest:
        """Return a request for tokens. Keys and values of its prompt are kept under this name alone (`cache_salt`)."""
        params = sampling(prompt, how, max_tokens=max_tokens, stop_ids=self._stop_ids)
        body = {
            "token_ids": list(prompt.ids),
            "sampling_params": params | {"n": 1, "min_tokens": 0, "detokenize": bool(how.stop)},
            "cache_salt": name,
            "return_token_ids": True,
            "stream": False,
        }
        return PolicyRequest(path="/inference/v1/generate", body=body, read=_tokens)

    # -- steps of a push -----------------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _asked(self._server, "POST", path, body or {})

    def _pause(self) -> None:
        self._post("/pause?mode=abort&clear_cache=true")

    def _rename(self, name: str) -> None:
        self._post("/update_weight_version", {"new_version": name})
        if (said := weight_version(self._server)) != name:
            raise MachineError(f"{self._server.url}: weights that were named {name} are called {said}  {START}")

    def _read(self, folder: Path) -> None:
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post("/collective_rpc", body)
        except ServerGoneError as error:
            if error.status is None or "method failed" not in str(error):
                raise
            raise MachineError(
                f"{self._server.url}: the server does not read the weights in {folder} ({error})  set [rollout] "
                "generator.folder to a folder that it sees under the same path, serve the base of [model] path, and "
                "start it anew: vLLM has ended its engine"
            ) from None

    def _forget(self) -> None:
        """Let it drop keys and values of prompts, those of connectors too."""
        said = self._post("/reset_prefix_cache?reset_external=true")
        if not (isinstance(said, dict) and said.get("success") is True):
            raise MachineError(
                f"{self._server.url}: the server keeps keys and values of older weights (it said {said!r})  no other "
                "program may use it, and connectors that cannot forget may not be set"
            )

    def _refuse_weights(self, answers: Sequence[ServerAnswer]) -> None:
        """Check that the server's weights are zero: else nobody would see that it did not read the next ones.

        Raises:
            NumericError: some tokens are likelier than others.
        """
        said = [logprob for answer in answers for logprob in answer.logprobs]
        if not max(said) - min(said) <= ZERO_GAP:
            raise NumericError(
                f"{self._server.url}: after its weights were set to zero the server still says log-probabilities from "
                f"{min(said):.6g} to {max(said):.6g}, and they would be equal: it answers with weights, or with keys "
                "and values, that it should have dropped"
            )


def weight_version(server: VllmServer) -> str:
    """Return the name of the server's weights.

    Raises:
        ServerGoneError: it does not answer.
        MachineError: it is not in its development mode, or older.
    """
    said = _asked(server, "GET", "/weight_info")
    version = said.get("weight_version") if isinstance(said, dict) else None
    if not isinstance(version, str):
        raise MachineError(f"{server.url}: the server does not say what its weights are called  {START}")
    return version


def takes_tokens(server: VllmServer) -> None:
    """Check that the server has the endpoint for tokens; nothing is answered.

    Raises:
        ServerGoneError: it does not answer.
        MachineError: it has not.
    """
    try:
        _asked(server, "POST", "/inference/v1/generate", {})
    except MachineError as error:
        if "HTTP 400" not in str(error) and "HTTP 422" not in str(error):  # it has read what it was asked
            raise


def refuse_public(url: str) -> None:
    """Check that a server in its development mode is on this machine or in a private network.

    Raises:
        ServerGoneError: no address is known of it.
        MachineError: one of its addresses can be reached by anybody.
    """
    host = urlsplit(url).hostname or ""
    try:
        found = {str(entry[4][0]).split("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ServerGoneError(f"{type(error).__name__}: {error}") from error
    public = sorted(address for address in found if ipaddress.ip_address(address).is_global)
    if public:
        raise MachineError(
            f"{url}: {public[0]} is an address of the open internet, and a vLLM server that takes weights does what "
            "whoever reaches it says  serve it on 127.0.0.1 or in a private network"
        )


def _asked(server: VllmServer, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    try:
        return server.call(method, path, body)
    except ServerGoneError as error:
        if error.status == 404:
            raise MachineError(
                f"{server.url}: the server takes no weights while it runs ({path}: {error})  {START}"
            ) from (None)
        raise


def _tokens(said: Any) -> ServerAnswer:
    """Read an answer; one with the weights that the server was started with means that it was started anew."""
    (choice,) = said["choices"]
    ids = tuple(choice["token_ids"])
    spans = [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"]]
    if any(version == AS_STARTED for version, _, _ in spans):
        raise ServerGoneError("it answers with the weights that it was started with")
    covered = [place for _, start, end in spans for place in range(start, end)]
    if covered != list(range(len(ids))):
        raise ValueError(f"its names of weights cover {len(covered)} of {len(ids)} tokens")
    stop = choice.get("stop_reason")
    return ServerAnswer(
        model=" and ".join(version for version, _, _ in spans),
        prompt_ids=tuple(said["prompt_token_ids"]),
        ids=ids,
        logprobs=tuple(float(token["logprob"]) for token in choice["logprobs"]["content"]),
        finish=choice["finish_reason"],
        stopped_by=stop if isinstance(stop, str) else "",
    )
