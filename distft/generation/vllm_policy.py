"""How a policy reaches a vLLM server, and how answers of it are asked for. Imports no torch.

Two ways: an adapter, which the server loads beside its base (here), and the weights themselves, which take the base's
place (`distft.generation.vllm_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from distft.generation.completion import Prompt, SamplingParams, seed_digest
from distft.generation.vllm_server import PolicyRequest, ServerAnswer, VllmServer

OURS = "distft-"
"""What names of policies begin with."""
PLAIN: dict[str, float] = {
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0
}  # fmt: skip
"""What a draw has none of; vLLM would take it from the model's generation_config.json."""
Probe = Callable[[str, int], "list[ServerAnswer] | bool | None"]
"""(name of the weights, tokens) -> the server's answers to some prompts; False when it went away, None: to stop."""


class ServedPolicy(Protocol):
    """The trained policy as a server has it. Rank 0 alone calls it, but for `write`."""

    write: Callable[[Path], None]
    """Collective: writes what the server reads into a folder."""
    files: str
    """Pattern of the files in it that the policy's digest is of."""
    wrong: str
    """What may be wrong where the server's log-probabilities are others than the trainer's."""

    def has(self, name: str) -> bool:
        """Return whether the server says that it has this policy.

        Raises:
            ServerGoneError: it does not answer.
            MachineError: it cannot be asked.
        """
        ...

    def push(self, name: str, folder: Path, probe: Probe) -> bool | None:
        """Let the server read the policy; False when it went away, None: to stop.

        Raises:
            ServerGoneError: it does not answer.
            MachineError, NumericError: it does not take it.
        """
        ...

    def request(self, name: str, prompt: Prompt, how: SamplingParams, max_tokens: int) -> PolicyRequest:
        """Return a request for an answer of this policy, which leaves nothing to the server's own defaults."""
        ...


def sampling(
    prompt: Prompt, how: SamplingParams, *, max_tokens: int, stop_ids: Sequence[int]
) -> dict[str, float | list[str] | list[int]]:
    """Return what both of vLLM's endpoints call the parameters of a draw."""
    return {
        "max_tokens": max_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        **PLAIN,
        "seed": int.from_bytes(seed_digest(how.seed, prompt.seed_key)[:8], "big") >> 1,
        "stop": list(how.stop),
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # its own idea of what ends an answer: ours is in stop_token_ids
        "logprobs": 0,
    }


class AdapterPolicy:
    """A LoRA adapter under the name of its digest. vLLM keeps keys and values of prompts by that name."""

    files = "adapter_*"
    wrong = "It has another base or another adapter, or computes in another type than [model] dtype."

    def __init__(self, server: VllmServer, write: Callable[[Path], None], stop_ids: Sequence[int]) -> None:
        """Keep where it is sent, what writes it, and the tokens that end an answer."""
        self.write, self._server, self._stop_ids = write, server, stop_ids

    def has(self, name: str) -> bool:
        """Return whether an adapter of this name is loaded."""
        return name in self._server.models()

    def push(self, name: str, folder: Path, probe: Probe) -> bool | None:
        """Load the adapter where it is not, and drop older ones of this run."""
        served = self._server.models()
        if name not in served:
            self._server.load_adapter(name, str(folder))
        for other, where in served.items():
            if other != name and other.startswith(OURS) and Path(where).parent == folder.parent:
                self._server.drop_adapter(other)
        return True

    def request(self, name: str, prompt: Prompt, how: SamplingParams, max_tokens: int) -> PolicyRequest:
        """Return a completion's request, with token ids in and out."""
        body = sampling(prompt, how, max_tokens=max_tokens, stop_ids=self._stop_ids)
        asked = {"model": name, "prompt": list(prompt.ids), "add_special_tokens": False, "return_token_ids": True}
        return PolicyRequest(path="/v1/completions", body=asked | body, read=_completion)


def _completion(said: Any) -> ServerAnswer:
    (choice,) = said["choices"]
    return ServerAnswer(
        model=said["model"],
        prompt_ids=tuple(choice["prompt_token_ids"]),
        ids=tuple(choice["token_ids"]),
        logprobs=tuple(map(float, choice["logprobs"]["token_logprobs"])),
        finish=choice["finish_reason"],
        stopped_by=_text(choice.get("stop_reason")),
    )


def _text(stop: Any) -> str:
    return stop if isinstance(stop, str) else ""
