"""The stand-in for a vLLM server, with streamed answers: several to a prompt, tokens and log-probabilities by id."""

from __future__ import annotations

import json
from typing import Any

from vllm_stand_in import StandIn


class StreamingStandIn(StandIn):
    """All events of an answer come at once; what is in them is as vLLM has it."""

    longest = 64
    chunk = 2
    """Tokens of an event."""
    breaks_off = False

    def get(self, path: str) -> tuple[int, Any]:
        status, content = super().get(path)
        if path == "/v1/models":
            content["data"][0]["max_model_len"] = self.longest
        return status, content

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/completions" or not body.get("stream"):
            return super().post(path, body)
        if len(body["prompt"]) + body["max_tokens"] > self.longest:
            return 400, {"error": {"message": "longer than the context"}}
        events: list[dict[str, Any]] = []
        for index in range(body["n"]):
            # a division by zero is no greedy answer: nearly zero is
            asked = body | {"seed": body["seed"] + index, "temperature": body["temperature"] or 1e-4}
            status, said = super().post(path, asked)
            if status != 200:
                return status, said
            (answer,) = said["choices"]
            ids, logprobs = answer["token_ids"], answer["logprobs"]["token_logprobs"]
            for start in range(0, len(ids), self.chunk):
                part = slice(start, start + self.chunk)
                choice = {"index": index, "text": "", "token_ids": ids[part], "finish_reason": None, "logprobs": None}
                if start + self.chunk >= len(ids):
                    choice |= {"finish_reason": "abort" if self.breaks_off else answer["finish_reason"]}
                if body.get("logprobs") is not None:
                    tops = [{f"token_id:{token}": value} for token, value in zip(ids, logprobs, strict=True)]
                    choice["logprobs"] = {"token_logprobs": logprobs[part], "top_logprobs": tops[part], "tokens": []}
                events.append({"model": body["model"], "choices": [choice]})
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
