"""Speaks the part of vLLM's HTTP API that rollouts use, with transformers and PEFT behind it: another program's model.

`python vllm_stand_in.py BASE PORT` serves until it is killed. Answers one request at a time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
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
        self.is_development = True
        """Whether it has the endpoints of the development mode, which weights need."""
        self.version = "default"
        self._resumed = threading.Event()
        self._resumed.set()
        self._cached: dict[Any, Any] = {}
        """Keys and values of prompts, by salt and ids."""
        self.skips: set[str] = set()
        """Steps of a push that it says it has done, and has not: "reset", "reload_weights", "reset_prefix_cache",
        "update_weight_version"; and "cache_salt"."""
        self.skips_tensor = ""
        """A tensor that it does not read, as vLLM on CPUs a head that is tied."""
        self.is_held = False
        """It cannot forget keys and values, and says so."""
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
        if path == "/weight_info" and self.is_development:
            return 200, {"weight_version": self.version}
        if path == "/v1/models":
            cards = [{"id": "base", "root": str(self._base), "parent": None}]
            cards += [{"id": name, "root": folder, "parent": "base"} for name, folder in self.adapters.items()]
            return 200, {"object": "list", "data": cards}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.seen.append((path, body))
        if self.is_development and path in _STEPS:
            with self._lock, torch.no_grad():
                return self._step(path, body)
        if path == "/inference/v1/generate" and self.is_development:
            return self._tokens(body) if body else _error(400, "token_ids: Field required")
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

    def _step(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Do a step of a push of whole weights."""
        if path == "/pause":
            self._resumed.clear()
        elif path == "/resume":
            self._resumed.set()
        elif path == "/weight_checker" and "reset" not in self.skips:
            assert body == {"action": "reset"}
            for param in self._lm.parameters():
                param.zero_()
        elif path == "/collective_rpc" and "reload_weights" not in self.skips:
            assert body["method"] == "reload_weights"
            assert not self._resumed.is_set(), "weights change while nothing is answered"
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            if not files:
                return _error(500, "Call to collective_rpc method failed: Worker failed with error 'Repo id must be'")
            for name, tensor in (item for file in files for item in load_file(file).items()):
                if name != self.skips_tensor:
                    self._lm.get_parameter(name).copy_(tensor)
        elif path == "/reset_prefix_cache":
            if self.is_held:
                return 200, {"success": False}
            if "reset_prefix_cache" not in self.skips:
                self._cached.clear()
            return 200, {"success": True}
        elif path == "/update_weight_version" and "update_weight_version" not in self.skips:
            self.version = body["new_version"]
        return 200, {"status": "ok"}

    def _tokens(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert self._resumed.wait(60), "paused, and never resumed"
        with self._lock, torch.no_grad():
            asked = body["sampling_params"] | {"prompt": body["token_ids"]}
            salt = "" if "cache_salt" in self.skips else body["cache_salt"]
            answer = self._complete(self._lm, asked, salt=salt)
            self.answered += 1
            version = self.says_model or self.version
        answer["weight_versions"] = [{"version": version, "start": 0, "end": len(answer["token_ids"])}]
        answer["logprobs"] = {"content": [{"logprob": said} for said in answer["logprobs"]["token_logprobs"]]}
        return 200, {"prompt_token_ids": answer.pop("prompt_token_ids"), "choices": [answer]}

    def _complete(self, lm: Any, body: dict[str, Any], *, salt: str | None = None) -> dict[str, Any]:
        drawn = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, finish, stopped_by = [], [], "length", None
        inputs, cache = torch.tensor([body["prompt"]]), None
        if salt is not None and len(body["prompt"]) > 1:
            key = (salt, *body["prompt"][:-1])
            if key not in self._cached:
                self._cached[key] = lm(input_ids=inputs[:, :-1], use_cache=True).past_key_values
            inputs, cache = inputs[:, -1:], copy.deepcopy(self._cached[key])
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


_STEPS = (
    "/pause", "/resume", "/weight_checker", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"
)  # fmt: skip


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
