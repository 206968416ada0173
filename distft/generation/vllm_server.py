"""Speaks HTTP with a vLLM server: what it serves, adapters loaded and dropped, answers as token ids. Imports no torch.

Needs no package of vLLM's: the server lives in an environment of its own, with other versions than a trainer's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from distft.core.errors import MachineError

LOOK_EVERY_S = 0.5
"""Between two looks at whether to stop, or whether the server is back."""


class ServerGoneError(Exception):
    """The server does not answer, or has forgotten an adapter: it may have been started anew."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        """Keep why.

        Args:
            message: what happened.
            status: of the HTTP answer; None where there was none.
        """
        self.status = status
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class ServerAnswer:
    """One answer, as the server said it."""

    model: str
    """Name of what has written it."""
    prompt_ids: tuple[int, ...]
    """The prompt as the server read it."""
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    """Why it ended, as vLLM says it."""
    stopped_by: str = ""
    """The text that ended it."""

    @property
    def ended(self) -> bool:
        """By a token or a text that ends answers, not by the limit."""
        return self.finish == "stop"


@dataclass(frozen=True, kw_only=True)
class PolicyRequest:
    """What is posted for one answer."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], ServerAnswer]
    """What came back -> the answer. LookupError, TypeError and ValueError mean that it lacks something."""


@dataclass(kw_only=True)
class VllmServer:
    """One server. Its calls may come from several threads; each has a connection of its own, which it keeps."""

    url: str
    timeout_s: float
    """For one answer."""
    key: str | None = None
    """Sent as a bearer token."""
    _local: threading.local = field(default_factory=threading.local)
    _connections: list[http.client.HTTPConnection] = field(default_factory=list[http.client.HTTPConnection])

    def is_up(self) -> bool:
        """Return whether it answers and says that it is well."""
        try:
            self.call("GET", "/health")
        except (ServerGoneError, MachineError):
            return False
        return True

    def models(self) -> dict[str, str]:
        """Return what is served, by name: the folder of each adapter, "" of the model itself.

        Raises:
            ServerGoneError: it does not answer.
        """
        listed = self.call("GET", "/v1/models")["data"]
        return {card["id"]: (card.get("root") or "") if card.get("parent") else "" for card in listed}

    def loads_adapters(self) -> bool:
        """Return whether it has the endpoint that loads adapters; nothing is loaded.

        Raises:
            ServerGoneError: it does not answer.
        """
        try:
            self.call("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""})
        except MachineError:  # it lacks a name, and so it has read what it was asked
            return True
        except ServerGoneError as error:
            if error.status != 404:
                raise
            return False
        return True

    def load_adapter(self, name: str, folder: str) -> None:
        """Let the server read an adapter folder, which it has to see under the same path.

        Raises:
            ServerGoneError: it does not answer.
            MachineError: it does not take the adapter; says why.
        """
        try:
            self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except ServerGoneError as error:
            if error.status is None or not self.is_up():
                raise
            if error.status == 404 and str(error) == "HTTP 404: Not Found":  # of the path, not of an adapter
                message = "loads no adapters while it runs"
                fix = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            elif error.status == 404:
                message = f"does not find the adapter in {folder} ({error})"
                fix = "set [rollout] generator.folder to a folder that it sees under the same path"
            else:
                message, fix = f"does not take the adapter ({error})", "start it with --max-lora-rank as large as r"
            raise MachineError(f"{self.url}: the server {message}  {fix}") from None

    def drop_adapter(self, name: str) -> None:
        """Let the server forget an adapter; nothing happens where it has none of this name.

        Raises:
            ServerGoneError: it does not answer.
        """
        try:
            self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServerGoneError as error:
            if error.status != 404:
                raise

    def answer(self, request: PolicyRequest) -> ServerAnswer:
        """Return the answer to a request.

        Raises:
            ServerGoneError: it does not answer, or broke off, or does not know the model that is asked.
            MachineError: it refuses the request, or its answer lacks ids or log-probabilities.
        """
        said = self.call("POST", request.path, request.body)
        try:
            answer = request.read(said)
        except (LookupError, TypeError, ValueError) as error:
            raise MachineError(
                f"{self.url}: its answer lacks token ids or log-probabilities ({type(error).__name__}: {error})  "
                "vLLM gives them from 0.10.2 on (return_token_ids), and names of weights from 0.32 on"
            ) from error
        if answer.finish not in ("stop", "length"):
            raise ServerGoneError(f"an answer was broken off (finish_reason {answer.finish!r})")
        if not answer.ids or len(answer.ids) != len(answer.logprobs):
            raise MachineError(
                f"{self.url}: an answer has {len(answer.ids)} tokens and {len(answer.logprobs)} log-probabilities"
            )
        return answer

    def ask(self, requests: Mapping[int, PolicyRequest], *, connections: int) -> Asked:
        """Ask all of these, `connections` at a time; whoever waits for the answers takes them from the result."""
        pool = ThreadPoolExecutor(max_workers=connections, thread_name_prefix="vllm")
        return Asked(self, pool, {pool.submit(self.answer, request): index for index, request in requests.items()})

    def wait_until_up(self, timeout_s: float, stop: Callable[[], bool]) -> bool:
        """Return True once it is well, False when `stop` says so meanwhile.

        Raises:
            MachineError: it was not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_up():
            if stop():
                return False
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{self.url}: no vLLM server has answered for {timeout_s:g} s  start it, or set "
                    "[rollout] generator.url; the run goes on from its last checkpoint"
                )
            time.sleep(LOOK_EVERY_S)
        return True

    def close(self) -> None:
        """Close all connections: threads that wait for answers get none, and the server drops their requests."""
        while self._connections:
            connection = self._connections.pop()
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(2)  # wakes up who reads from it, as close() alone does not
            connection.close()

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return what it says: JSON where it is some, else text.

        Raises:
            ServerGoneError: it does not answer, or with HTTP 404 or 5xx.
            MachineError: it refuses what it is asked.
        """
        headers = {"Content-Type": "application/json"}
        headers |= {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        connection = self._connection()
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerGoneError(f"{type(error).__name__}: {error}") from error
        text = raw.decode(errors="replace")
        if status < 400:
            return json.loads(text) if text[:1] in ("{", "[") else text
        message = f"HTTP {status}: {reason(text)}"
        if status == 404 or status >= 500:  # an adapter that it no longer has; an engine that has died
            raise ServerGoneError(message, status=status)
        raise MachineError(f"{self.url}{path}: {message}")

    @property
    def _path(self) -> str:
        return urlsplit(self.url).path.rstrip("/")

    def _connection(self) -> http.client.HTTPConnection:
        known: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if known is None:
            parts = urlsplit(self.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            known = self._local.connection = kind(parts.netloc, timeout=self.timeout_s)
        if known not in self._connections:
            self._connections.append(known)
        return known


class Asked:
    """Requests that a server is answering."""

    def __init__(self, server: VllmServer, pool: ThreadPoolExecutor, waiting: dict[Future[ServerAnswer], int]) -> None:
        self._server, self._pool, self._index = server, pool, waiting
        self._left = set(waiting)

    def collect(self, keep: dict[int, ServerAnswer], limit_s: float, stop: Callable[[], bool]) -> bool:
        """Put answers into `keep` until all are there, or for about `limit_s`, or until `stop` says so.

        Returns:
            Whether all are there; else go on collecting, or `close`.

        Raises:
            ServerGoneError, MachineError: as `VllmServer.answer`; it is closed then.
        """
        deadline = time.monotonic() + limit_s
        while self._left:
            if stop() or time.monotonic() > deadline:
                return False
            done, self._left = wait(self._left, timeout=min(LOOK_EVERY_S, limit_s), return_when=FIRST_EXCEPTION)
            failed = None
            for future in done:
                if (error := future.exception()) is None:
                    keep[self._index[future]] = future.result()
                elif failed is None or isinstance(error, MachineError):
                    failed = error
            if failed is not None:
                self.close()
                raise failed
        self.close()
        return True

    def close(self) -> None:
        """Ask for nothing more; what is being answered is broken off."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if any(not future.done() for future in self._left):
            self._server.close()


def reason(text: str) -> str:
    """Return what an error says: OpenAI's form, FastAPI's, or the text itself."""
    try:
        said = json.loads(text)
    except ValueError:
        return text[:300]
    error = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:600]


def model_of(models: Mapping[str, str]) -> Sequence[str]:
    """Return the names of what `VllmServer.models` lists that is no adapter."""
    return [name for name, folder in models.items() if not folder]
