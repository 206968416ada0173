"""`python -m distft.service.answering WORKDIR`: the process that writes answers, a line of JSON for each piece.

It is the server's child, so that models take none of the server's memory and time, and what goes wrong in one ends no
server. Requests come on standard input, one is answered at a time, in the order in which they came.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import torch

from distft.core.errors import DistftError, RecipeError
from distft.core.log import quiet_libraries
from distft.data.templates import read_template
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.generation.local import local_generator
from distft.routing.token_generator import TokenRoutedGenerator
from distft.service.loaded_models import LoadedModels, Served, prompt_ids
from distft.service.tool_calls import ReadAnswer, ToolChats, read_answer

ASKS = ("messages", "prompt", "response_format")
"""Fields of a request that the answering process reads."""


class RequestError(Exception):
    """A request that cannot be answered, by its own fault."""

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)


class StreamedAnswer:
    """Turns tokens into pieces of text; what may be the start of a stop text waits until it is known."""

    def __init__(self, served: Served, stop: tuple[str, ...]) -> None:
        self._served, self._stop = served, stop
        self._ids: list[int] = []
        self._sent = ""

    def take(self, token: int) -> str:
        """Take the next token; return what may be shown."""
        if token in self._served.stop_ids:
            return ""
        self._ids.append(token)
        return self._show(self._served.tokenizer.decode(self._ids, skip_special_tokens=True), whole=False)

    def finish(self, text: str) -> str:
        """Return what is left of the whole text."""
        return self._show(text, whole=True)

    def _show(self, text: str, *, whole: bool) -> str:
        if not whole:
            ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            text = text[: min(ends)] if ends else text
            if text.endswith("\ufffd"):  # half a character
                return ""
            held = max(
                (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
            )
            text = text[: len(text) - held]
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text if len(text) > len(self._sent) else self._sent
        return piece


class AnswerProcess:
    """Reads requests, writes events."""

    def __init__(self, workdir: Path, out: TextIO) -> None:
        self._models, self._out = LoadedModels(workdir), out
        self._given_up: set[int] = set()
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def run(self, lines: TextIO) -> None:
        """Answer until the input ends."""
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while (request := self._requests.get()) is not None:
            try:
                if request["id"] not in self._given_up:
                    self._answer(request)
            except RequestError as error:
                self._say(request, event="refused", message=str(error), code=error.code)
            except DistftError as error:
                self._say(request, event="refused", **_refusal(error))
            except Exception as error:
                print(f"an answer failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self._say(request, event="failed", message=type(error).__name__)
            self._given_up.discard(request["id"])

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            request = json.loads(line)
            if "give_up" in request:
                self._given_up.add(request["give_up"])
            else:
                self._requests.put(request)
        self._requests.put(None)

    def _say(self, request: dict[str, Any], **event: Any) -> None:
        self._out.write(json.dumps({"id": request["id"], **event}) + "\n")
        self._out.flush()

    def _answer(self, request: dict[str, Any]) -> None:
        served = self._models.get(request["given"])
        name = request.get("chat_template", "auto")
        template = read_template(name)
        form = None
        if request.get("tools"):
            form = ToolChats(served.tokenizer, template or served.tokenizer.chat_template or "").form()
        asked = prompt_ids(served, {**request, "template": template})
        if not asked:
            raise RequestError("The prompt is empty.", "invalid_value")
        stop = tuple(request["stop"])
        streams = [StreamedAnswer(served, stop) for _ in range(request["n"])]

        def hear(row: int, token: int) -> None:
            if form is None and (piece := streams[row].take(token)):  # a call is known once the answer is whole
                self._say(request, event="piece", index=row, text=piece)

        def given_up() -> bool:
            return request["id"] in self._given_up

        if served.chooses_by_token and request["logprobs"] is not None:
            raise RequestError("A router that chooses for each token gives no logprobs.", "unsupported_parameter")
        schema = request.get("schema")
        if schema is not None and served.chooses_by_token:
            raise RequestError(
                "A router that chooses for each token takes no response_format.", "unsupported_parameter"
            )
        constrain = None
        if schema is not None:
            served.grammars.constraint(schema)  # a wrong one is refused before anything is written
            constrain = lambda row: served.grammars.constraint(schema)  # noqa: E731
        with self._models.using(served, asked) as lm:
            generator = local_generator(
                lm, served.tokenizer, served.stop_ids, stop=given_up, heard=hear, constrain=constrain
            )
            longest = generator.longest
            if served.chooses_by_token:
                generator = TokenRoutedGenerator(
                    served.routed, served.tokenizer, served.stop_ids, stop=given_up, heard=hear
                )
            how = SamplingParams(
                max_new_tokens=_room(request, len(asked), longest), temperature=request["temperature"],
                top_p=request["top_p"], stop=stop, seed=request["seed"],
            )  # fmt: skip
            prompts = [Prompt(seed_key=f"answer {index}", ids=asked) for index in range(request["n"])]
            made = generator.generate(prompts, how)
            if made is None:
                return
            for index, completion in enumerate(made):
                text, calls = completion.text, ()
                if form is not None:
                    names = [tool["function"]["name"] for tool in request["tools"]]
                    answer = read_answer(text, form, names) if completion.ended else ReadAnswer(content=text)
                    text, calls = answer.content, answer.calls
                if piece := streams[index].finish(completion.text) if form is None else "":
                    self._say(request, event="piece", index=index, text=piece)
                tokens = None
                if request["logprobs"] is not None:
                    tokens = _logprobs(lm, served, asked, completion, request["logprobs"])
                reason = "length" if not completion.ended else "tool_calls" if calls else "stop"
                self._say(
                    request, event="end", index=index, text=text, num_tokens=completion.num_tokens,
                    finish_reason=reason, logprobs=tokens, **({} if form is None else {"calls": calls}),
                )  # fmt: skip
        self._say(request, event="done", prompt_tokens=len(asked))


def _room(request: dict[str, Any], num_asked: int, longest: int | None) -> int:
    """Return the most tokens of an answer."""
    room = request["max_tokens"] or request["default_tokens"]
    if longest is None:
        return room
    left = longest - num_asked
    if left < 1 or (request["max_tokens"] and request["max_tokens"] > left):
        message = f"This model's context has {longest} tokens; the prompt has {num_asked}, and {room} were asked for."
        raise RequestError(message, "context_length_exceeded")
    return min(room, left)


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

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = served.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        entry(token, scored[place, token].item())
        | {
            "top_logprobs": [
                entry(likely, value)
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
