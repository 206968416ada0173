"""`python -m distft.service.answering WORKDIR`: the process that writes answers, a line of JSON for each piece.

It is the server's child, so that models take none of the server's memory and time, and what goes wrong in one ends no
server. Requests come on standard input. Of models in this process one is answered at a time, in the order in which they
came; vLLM servers are asked side by side.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch

from distft.core.errors import DistftError, RecipeError
from distft.core.log import quiet_libraries
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.generation.local import local_generator
from distft.routing.token_generator import TokenRoutedGenerator
from distft.service.loaded_models import LoadedModels, Served
from distft.service.remote_models import RemoteModel, RemoteModels
from distft.service.tokenized_request import RequestError, token_entry, tokenize_request

Events = Generator[dict[str, Any], None, None]
SIDE_BY_SIDE = 64
"""Requests that vLLM servers are asked at the same time."""
ASKS = ("messages", "prompt", "response_format")
"""Fields of a request that the answering process reads."""


class AnswerProcess:
    """Reads requests, writes events: own models one request at a time, those of vLLM servers side by side."""

    def __init__(self, workdir: Path, out: TextIO) -> None:
        self._models, self._remote = LoadedModels(workdir / "own"), RemoteModels(workdir / "remote")
        self._out, self._turn = out, threading.Lock()
        self._given_up: set[int] = set()
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._remote_requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def run(self, lines: TextIO) -> None:
        """Answer until the input ends."""
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        threading.Thread(target=self._ask_servers, daemon=True).start()
        while (request := self._requests.get()) is not None:
            self._say_all(request, self._answer)

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            request = json.loads(line)
            if "give_up" in request:
                self._given_up.add(request["give_up"])
            else:
                (self._remote_requests if request.get("vllm") else self._requests).put(request)
        self._remote_requests.put(None)

    def _ask_servers(self) -> None:
        with ThreadPoolExecutor(max_workers=SIDE_BY_SIDE, thread_name_prefix="vllm") as pool:
            while (request := self._remote_requests.get()) is not None:
                try:
                    model = self._remote.find(request)
                except Exception as error:
                    self._say_error(request, error)
                    continue
                if model is None:
                    self._requests.put(request)
                else:
                    pool.submit(self._say_all, request, functools.partial(self._answer_remotely, model))
        self._requests.put(None)

    def _say_all(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], Events]) -> None:
        """Write the events of a request until somebody gives it up."""
        try:
            with contextlib.closing(answer(request)) as events:
                for event in events:
                    if request["id"] in self._given_up:
                        break
                    self._say(request, event)
        except Exception as error:
            self._say_error(request, error)
        self._given_up.discard(request["id"])

    def _say(self, request: dict[str, Any], event: dict[str, Any]) -> None:
        with self._turn:
            self._out.write(json.dumps({"id": request["id"], **event}) + "\n")
            self._out.flush()

    def _say_error(self, request: dict[str, Any], error: Exception) -> None:
        match error:
            case RequestError():
                refusal = {"message": str(error), "code": error.code}
            case DistftError():
                refusal = _refusal(error)
            case _:
                print(f"an answer failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self._say(request, {"event": "failed", "message": type(error).__name__})
                return
        self._say(request, {"event": "refused", **refusal})

    def _answer_remotely(self, model: RemoteModel, request: dict[str, Any]) -> Events:
        tokenized = tokenize_request(model.served, request)
        if tokenized.schema is not None:  # one that would be passed over in part is refused here as everywhere
            model.served.grammars.constraint(tokenized.schema)
        yield from self._remote.ask(model, tokenized)
        yield {"event": "done", "prompt_tokens": len(tokenized.ids)}

    def _answer(self, request: dict[str, Any]) -> Events:
        """Yield the events that come once an answer is whole; pieces are written as they are made."""
        if request["id"] in self._given_up:
            return
        served = self._models.get(request["given"])
        tokenized = tokenize_request(served, request)

        def hear(row: int, token: int) -> None:
            for event in tokenized.piece(row, token):
                self._say(request, event)

        def given_up() -> bool:
            return request["id"] in self._given_up

        schema = tokenized.schema
        if served.chooses_by_token and tokenized.num_logprobs is not None:
            raise RequestError("A router that chooses for each token gives no logprobs.", "unsupported_parameter")
        if served.chooses_by_token and schema is not None:
            raise RequestError(
                "A router that chooses for each token takes no response_format.", "unsupported_parameter"
            )
        constrain = None
        if schema is not None:
            served.grammars.constraint(schema)  # a wrong one is refused before anything is written
            constrain = lambda row: served.grammars.constraint(schema)  # noqa: E731
        with self._models.using(served, tokenized.ids) as lm:
            generator = local_generator(
                lm, served.tokenizer, served.stop_ids, stop=given_up, heard=hear, constrain=constrain
            )
            room = tokenized.room(generator.longest)
            if served.chooses_by_token:
                generator = TokenRoutedGenerator(
                    served.routed, served.tokenizer, served.stop_ids, stop=given_up, heard=hear
                )
            how = SamplingParams(
                max_new_tokens=room, temperature=request["temperature"], top_p=request["top_p"], stop=tokenized.stop,
                seed=request["seed"],
            )  # fmt: skip
            prompts = [Prompt(seed_key=f"answer {index}", ids=tokenized.ids) for index in range(request["n"])]
            made = generator.generate(prompts, how)
            for index, completion in enumerate(made or ()):
                tokens = None
                if tokenized.num_logprobs is not None:
                    tokens = _logprobs(lm, served, tokenized.ids, completion, tokenized.num_logprobs)
                yield from tokenized.end(index, completion, tokens)
        if made is not None:
            yield {"event": "done", "prompt_tokens": len(tokenized.ids)}


@torch.no_grad()
def _logprobs(lm: Any, served: Served, asked: list[int], made: Completion, top: int) -> list[dict[str, Any]]:
    """Return the log-probability of each token of an answer at temperature 1, and of the likeliest beside it."""
    shown = [token for token in made.ids if token not in served.stop_ids]
    if not shown:
        return []
    ids = torch.tensor([[*asked, *shown]], device=next(lm.parameters()).device)
    logits = lm(input_ids=ids).logits[0, len(asked) - 1 : -1].float()
    scored = torch.log_softmax(logits, dim=1)
    best = scored.topk(max(1, top), dim=1)

    return [
        token_entry(served.tokenizer, token, scored[place, token].item())
        | {
            "top_logprobs": [
                token_entry(served.tokenizer, likely, value)
                for likely, value in zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)
            ][:top]
        }
        for place, token in enumerate(shown)
    ]


def _refusal(error: DistftError) -> dict[str, Any]:
    """Return what is wrong, and the field of the request that is, where it is one."""
    if not isinstance(error, RecipeError):
        return {"message": str(error), "code": "model_unavailable"}
    message = "; ".join(f"{problem.message} {problem.fix}".strip() for problem in error.problems)
    param = error.source if error.source.partition(".")[0] in ASKS else None
    return {"message": message, "code": "invalid_value", "param": param}


def main(argv: list[str]) -> int:
    """Answer what comes on standard input."""
    quiet_libraries()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    workdir = Path(argv[0])
    workdir.mkdir(parents=True, exist_ok=True)
    AnswerProcess(workdir, out).run(sys.stdin)
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
