"""Speaks the part of vLLM's HTTP API that rollouts use, with transformers and PEFT behind it: another program's model.

`python vllm_stand_in.py BASE PORT` serves until it is killed. Answers one request at a time.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class StandIn:
    """A server with faults: what it does wrong is set from outside, at any time."""

    def __init__(self, base: Path, port: int = 0, *, loads: bool = True) -> None:
        self._base = base
        with contextlib.suppress(OSError, ValueError):  # where texts end answers
            self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._lm = self._fresh()
        self._lock = threading.Lock()
        self.loads = loads
        """Whether it has the adapters' endpoints."""
        self.adapters: dict[str, str] = {}
        self._tuned: dict[str, Any] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        """Paths and bodies of what it was asked, answers to GET left out."""
        self.ignores_adapters = False
        """Answers by the base under the adapter's name: the wrong weights."""
        self.says_model: str | None = None
        """Another name in its answers."""
        self.raw_logprobs = False
        """Log-probabilities before temperature, as vLLM's default is."""
        self.dies_after: int | None = None
        """Answers until it breaks all connections, and answers nothing any more."""
        self.answered = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _fresh(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()

    def kill(self) -> None:
        """Answer nothing any more, on any connection."""
        self.dies_after = -1
        self._http.shutdown()
        self._http.server_close()

    @property
    def is_dead(self) -> bool:
        return self.dies_after is not None and self.answered >= self.dies_after

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            cards = [{"id": "base", "root": str(self._base), "parent": None}]
            cards += [{"id": name, "root": folder, "parent": "base"} for name, folder in self.adapters.items()]
            return 200, {"object": "list", "data": cards}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.seen.append((path, body))
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.loads:
            name = body["lora_name"]
            if path == "/v1/unload_lora_adapter":
                return (200, "ok") if self.adapters.pop(name, None) else _error(404, f"`{name}` cannot be found")
            if not name:
                return _error(400, "Both 'lora_name' and 'lora_path' must be provided.")
            if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
                return _error(404, f"No adapter found for {body['lora_path']}")
            self._tuned[name] = PeftModel.from_pretrained(self._fresh(), body["lora_path"]).eval()
            self.adapters[name] = body["lora_path"]
            return 200, "ok"
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["model"] not in (*self.adapters, "base"):
            return _error(404, f"The model `{body['model']}` does not exist.")
        with self._lock, torch.no_grad():
            tuned = body["model"] != "base" and not self.ignores_adapters
            answer = self._complete(self._tuned[body["model"]] if tuned else self._lm, body)
            self.answered += 1
        return 200, {"model": self.says_model or body["model"], "choices": [answer]}

    def _complete(self, lm: Any, body: dict[str, Any]) -> dict[str, Any]:
        drawn = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, finish, stopped_by = [], [], "length", None
        inputs, cache = torch.tensor([body["prompt"]]), None
        while len(ids) < body["max_tokens"] and finish == "length":
            output = lm(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache, logits_V = output.past_key_values, output.logits[0, -1].float()
            scaled_V = logits_V / body["temperature"]
            sorted_V, order_V = scaled_V.softmax(0).sort(descending=True)
            left_out_V = torch.zeros_like(scaled_V, dtype=torch.bool)
            left_out_V[order_V[(sorted_V.cumsum(0) - sorted_V >= body["top_p"])]] = True
            scaled_V = scaled_V.masked_fill(left_out_V, -torch.inf)
            token = int(torch.multinomial(scaled_V.softmax(0), 1, generator=drawn))
            ids.append(token)
            said_V = logits_V if self.raw_logprobs else scaled_V
            logprobs.append(float(said_V.log_softmax(0)[token]))
            inputs = torch.tensor([[token]])
            if token in body["stop_token_ids"]:
                finish, stopped_by = "stop", token
            for text in body["stop"]:
                if text in self._tokenizer.decode(ids):
                    finish, stopped_by = "stop", text
        return {
            "index": 0, "text": "", "finish_reason": finish, "stop_reason": stopped_by, "token_ids": ids,
            "prompt_token_ids": body["prompt"], "logprobs": {"token_logprobs": logprobs},
        }  # fmt: skip


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(*server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not server.is_dead:
                self._say(*server.post(self.path, body))
            else:
                self.close_connection = True

        def _say(self, status: int, content: Any) -> None:
            if server.is_dead:
                self.close_connection = True
                return
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


if __name__ == "__main__":
    torch.set_num_threads(1)
    StandIn(Path(sys.argv[1]), int(sys.argv[2]))
    threading.Event().wait()
