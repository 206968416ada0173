"""A vLLM server answers, with the policy as it is trained: pushed after each update, and proven before it answers.

An adapter, or the weights of a model that is trained whole, is named after the digest of its files, and every answer
says which one has written it. After each push the server answers some prompts, and the log-probabilities that it says
are held against the trainer's own.

Rank 0 alone speaks with the server: the scheduler there fills batches by itself, whoever asks, and every rank needs
every answer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.errors import MachineError, NumericError
from distft.core.phase import PHASE
from distft.core.ranks import on_rank_zero
from distft.core.registry import Params
from distft.generation.completion import Completion, Prompt, SamplingParams, completion_of
from distft.generation.spec import GeneratorInputs, GeneratorSpec
from distft.generation.vllm_policy import OURS, AdapterPolicy, ServedPolicy
from distft.generation.vllm_server import Asked, ServerAnswer, ServerGoneError, VllmServer, model_of
from distft.generation.vllm_weights import WeightsPolicy, refuse_public, takes_tokens, weight_version

if TYPE_CHECKING:
    from distft.generation.generator import Generator

EXACT_GAP, HALF_GAP = 1e-3, 0.05
"""Mean distance of probes' log-probabilities that is let pass unless the recipe says another, in fp32 and in 16 bits:
kernels differ by less (`docs/results/2026-11-30-vllm.md`), and a policy that was forgotten by more."""
SLICE_S = 60.0
"""Longest that rank 0 waits for answers before all ranks agree to go on: collectives have a time limit."""
FRUITLESS = 3
"""Pushes to a server that goes away each time before it has answered anything, until the run ends."""


class VllmParams(Params):
    """Which server, and how long it is waited for."""

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+")
    """The server, without /v1. It serves the base of [model] path: for adapters with --enable-lora, and with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment; for full fine-tuning with --enable-scale-out, and with
    VLLM_SERVER_DEV_MODE=1."""
    api_key_env: str | None = Field(default=None, min_length=1)
    """Environment variable that holds the key which the server asks for."""
    folder: str | None = Field(default=None, min_length=1)
    """Where adapters or weights are written that the server reads, under the same path on its machine; in the run
    folder unless set. Weights lie there twice while new ones are written."""
    connections: int = Field(default=64, ge=1, le=4096)
    """Answers that are asked for at a time."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that one answer may take, or reading the weights."""
    restart_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that a server which does not answer is waited for, until the run ends."""
    probe_prompts: int = Field(default=4, ge=1)
    """Prompts that are answered after each push, to hold the server's log-probabilities against the trainer's."""
    probe_tokens: int = Field(default=16, ge=1)
    """Tokens of each of these answers."""
    max_gap: float | None = Field(default=None, gt=0)
    """Mean distance of those log-probabilities above which the run ends; 0.001 in float32 and 0.05 in bfloat16 unless
    set."""


class VllmGenerator:
    """A `CompletionGenerator` over a server. Collective: all ranks pass the same arguments."""

    def __init__(self, params: VllmParams, inputs: GeneratorInputs, weigher: Generator) -> None:
        """Wait for the server.

        Args:
            params: which server.
            inputs: the model and how its adapter, or all of its weights, are written.
            weigher: gives the trainer's own log-probabilities of probes.

        Raises:
            MachineError: it does not answer, or no key is where the recipe says.
        """
        self._params, self._inputs, self._weigher = params, inputs, weigher
        self._folder = (Path(params.folder) if params.folder else inputs.folder / "policy").absolute()
        self._server = _server(params, timeout_s=params.timeout_s)
        self._policy = _policy(self._server, inputs)
        self._pushed = ""
        """The policy that the server was given and has proven."""
        self._why = ""
        """Why the server went away last."""
        self._asked: Asked | None = None
        """What it is answering."""

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        """Push the weights as they are, prove them, and return an answer to each prompt, in order.

        None when some rank was asked to stop before the end.

        Raises:
            NumericError: the server computes otherwise than the trainer, or an answer is another policy's.
            MachineError: the server stays away, or refuses what it is asked.
        """
        PHASE.enter("eval", patient=True)
        engine, name = self._inputs.engine, self._written()
        self._asked = None  # an error may have left one that is closed
        known: dict[int, ServerAnswer] = {}
        tries, most = 0, -1
        while True:
            done = on_rank_zero(engine, lambda: self._push(name, prompts, how))
            done = done and self._prove(name, prompts, how)
            while done is True:
                done = on_rank_zero(engine, lambda: self._collect(name, prompts, how, known))
                if done is True and engine.sum_over_ranks(self._inputs.stop())[0]:
                    done = None
            if done is not False:
                if done is None and self._asked is not None:
                    self._asked.close()
                self._asked = None
                return done
            answered, why = on_rank_zero(engine, lambda: (len(known), self._why))
            tries = tries + 1 if answered <= most else 1
            if tries > FRUITLESS:
                raise MachineError(
                    f"{self._params.url}: the server went away {tries} times in a row before it had answered anything, "
                    f"at last with {why}  its own log says more"
                )
            most = max(most, answered)

    def _went(self, error: ServerGoneError) -> bool:
        self._why, self._asked = str(error), None
        return False

    # -- the policy on the server --------------------------------------------------------------------------------------

    def _written(self) -> str:
        """Collective: write the policy as it is into a folder of its digest; return its name."""
        fresh = self._folder / "next"
        on_rank_zero(self._inputs.engine, lambda: self._keep(self._pushed))
        self._policy.write(fresh)
        return on_rank_zero(self._inputs.engine, lambda: self._named(fresh))

    def _keep(self, name: str) -> None:
        """Remove what was written before, but for this."""
        for path in (*self._folder.glob(f"{OURS}*"), self._folder / "next"):
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)

    def _named(self, fresh: Path) -> str:
        digest = hashlib.sha256()
        for file in sorted(fresh.glob(self._policy.files)):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        name = OURS + digest.hexdigest()[:32]
        folder = self._folder / name
        if folder.exists():
            shutil.rmtree(fresh)
        else:
            fresh.rename(folder)
        return name

    def _push(self, name: str, prompts: Sequence[Prompt], how: SamplingParams) -> bool | None:
        """Let the server have this policy and no older one of this run; False when it went away, None: to stop."""
        server = self._server
        if not server.wait_until_up(self._params.restart_timeout_s, self._inputs.stop):
            return None
        try:
            if self._pushed != name or not self._policy.has(name):
                self._pushed = ""
                probes = self._probes(prompts)
                done = self._policy.push(
                    name, self._folder / name, lambda called, tokens: self._probed(called, probes, how, tokens)
                )
                if done is not True:
                    return done
        except ServerGoneError as error:
            return self._went(error)
        self._keep(name)
        return True

    def _probes(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list({tuple(prompt.ids): prompt for prompt in prompts}.values())[: self._params.probe_prompts]

    def _prove(self, name: str, prompts: Sequence[Prompt], how: SamplingParams) -> bool | None:
        """Collective: hold the server's log-probabilities against the trainer's, once after each push.

        False when the server went away, None when some rank was asked to stop.

        Raises:
            NumericError: they are further apart than allowed, on all ranks.
        """
        engine = self._inputs.engine
        if on_rank_zero(engine, lambda: self._pushed == name):
            return True
        probes = self._probes(prompts)
        tokens = min(self._params.probe_tokens, how.max_new_tokens)
        said = on_rank_zero(engine, lambda: self._probed(name, probes, how, tokens))
        if said is None or isinstance(said, bool):
            return said
        weighed = self._weigher.token_logprobs(
            [(prompt.ids, answer.ids) for prompt, answer in zip(probes, said, strict=True)],
            temperature=how.temperature,
        )
        PHASE.enter("eval", patient=True)
        if weighed is None:
            return None
        pairs = [
            (theirs, ours, f"prompt {number + 1}, token {place + 1}")
            for number, (answer, logprobs) in enumerate(zip(said, weighed, strict=True))
            for place, (theirs, ours) in enumerate(zip(answer.logprobs, logprobs, strict=True))
        ]
        mean = sum(abs(theirs - ours) for theirs, ours, _ in pairs) / len(pairs)
        theirs, ours, where = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        half = EXACT_GAP if self._inputs.dtype == "float32" else HALF_GAP
        most = half if self._params.max_gap is None else self._params.max_gap
        if not mean <= most:
            at = _mode_needed(how)
            raise NumericError(
                f"{self._params.url} is not the policy: its log-probabilities of {len(pairs)} tokens are {mean:.4g} "
                f"from the trainer's on average, and {most:g} is allowed ({where}: {theirs:.6g} there, {ours:.6g} "
                f"here). {self._policy.wrong}{at} "
                "Where kernels alone differ: [rollout] generator.max_gap"
            )
        self._pushed = name
        return True

    def _probed(
        self, name: str, probes: Sequence[Prompt], how: SamplingParams, tokens: int
    ) -> list[ServerAnswer] | bool | None:
        requests = {number: self._policy.request(name, prompt, how, tokens) for number, prompt in enumerate(probes)}
        known: dict[int, ServerAnswer] = {}
        asked = self._server.ask(requests, connections=self._params.connections)
        try:
            if not asked.collect(known, self._params.timeout_s, self._inputs.stop):
                asked.close()
                return None if self._inputs.stop() else self._went(ServerGoneError("probes were not answered in time"))
        except ServerGoneError as error:
            return self._went(error)
        for number, prompt in enumerate(probes):
            self._check(name, prompt, how, known[number])
        return [known[number] for number in range(len(probes))]

    # -- answers -------------------------------------------------------------------------------------------------------

    def _collect(
        self, name: str, prompts: Sequence[Prompt], how: SamplingParams, known: dict[int, ServerAnswer]
    ) -> list[Completion] | bool | None:
        """Return all answers once they are there; True: not yet; False: the server went away; None: to stop.

        It returns every now and then, so that no other rank waits in one collective for as long as a rollout takes.
        """
        if self._asked is None:
            missing = [index for index in range(len(prompts)) if index not in known]
            requests = {index: self._policy.request(name, prompts[index], how, how.max_new_tokens) for index in missing}
            self._asked = self._server.ask(requests, connections=self._params.connections)
        try:
            if not self._asked.collect(known, SLICE_S, self._inputs.stop):
                return None if self._inputs.stop() else True
        except ServerGoneError as error:
            return self._went(error)
        stop_ids = frozenset(self._inputs.stop_ids)
        made: list[Completion] = []
        for index, prompt in enumerate(prompts):
            answer = known[index]
            self._check(name, prompt, how, answer)
            made.append(
                completion_of(
                    answer.ids,
                    answer.logprobs if how.logprobs else (),
                    ends_with_token=answer.ended and answer.ids[-1] in stop_ids,
                    ended=answer.ended,
                    decode=self._inputs.decode,
                    stop=how.stop,
                    policy=answer.model,
                )
            )
        return made

    def _check(self, name: str, prompt: Prompt, how: SamplingParams, answer: ServerAnswer) -> None:
        """Refuse an answer that is not this policy's to this prompt.

        Raises:
            NumericError: it is another's, or to another text.
            MachineError: it ends with what ends no answer here.
        """
        if answer.model != name:
            raise NumericError(f"{self._params.url}: an answer is of {answer.model}, and the policy is {name}")
        if answer.prompt_ids != tuple(prompt.ids):
            raise NumericError(
                f"{self._params.url}: the server read {len(answer.prompt_ids)} tokens where {len(prompt.ids)} others "
                "were sent: answers would be to another prompt than is trained"
            )
        by_token = answer.ids[-1] in self._inputs.stop_ids
        if answer.ended and not by_token and answer.stopped_by not in how.stop:
            raise MachineError(
                f"{self._params.url}: an answer ended with token {answer.ids[-1]}, which ends none here  start the "
                "server with --generation-config vllm"
            )


def _mode_needed(how: SamplingParams) -> str:
    """Return how the server has to be started for its log-probabilities to be those of the policy; "": either way."""
    if how.temperature != 1:
        return f" With temperature = {how.temperature:g} it has to be started with --logprobs-mode processed_logprobs."
    if how.top_p < 1:
        return f" With top_p = {how.top_p:g} it has to be started with --logprobs-mode raw_logprobs, its default."
    return ""


def _refuses_draws(temperature: float, top_p: float) -> str:
    if temperature == 1 or top_p == 1:
        return ""
    return (
        f"a vLLM server says log-probabilities before the temperature or after top_p, and at temperature = "
        f"{temperature:g} the policy's are behind the one and before the other"
    )


def _server(params: VllmParams, *, timeout_s: float) -> VllmServer:
    key = None
    if params.api_key_env is not None and not (key := os.environ.get(params.api_key_env)):
        raise MachineError(f"[rollout] generator.api_key_env: {params.api_key_env} is not set or empty")
    return VllmServer(url=params.url.rstrip("/"), timeout_s=timeout_s, key=key)


def _policy(server: VllmServer, inputs: GeneratorInputs) -> ServedPolicy:
    if inputs.write_adapter is not None:
        return AdapterPolicy(server, inputs.write_adapter, inputs.stop_ids)
    assert inputs.write_model is not None
    return WeightsPolicy(server, inputs.write_model, inputs.stop_ids)


def _look(params: VllmParams, method: Any) -> str:
    """Return what the server serves.

    Raises:
        MachineError: it does not answer, or takes no adapters, or no weights where the method trains all of them.
    """
    server = _server(params, timeout_s=10.0)
    try:
        if not method.adapter:
            refuse_public(server.url)
        served = model_of(server.models())
        if not method.adapter:
            version = weight_version(server)
            takes_tokens(server)
            return f"{params.url} serves {', '.join(served)} and takes weights (its own are called {version})"
        if not server.loads_adapters():
            raise MachineError(
                f"{params.url}: the server loads no adapters while it runs  start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
    except ServerGoneError as error:
        raise MachineError(f"{params.url}: no vLLM server answers ({error})  start it before the run") from error
    return f"{params.url} serves {', '.join(served)} and loads adapters"


def _refuses(params: VllmParams, method: Any, method_params: Any) -> str:
    """Return why the server cannot have what this method trains."""
    if not method.adapter:
        return ""
    from distft.model.adapters.lora_params import LoraParams

    if not isinstance(method_params, LoraParams):
        return f'a vLLM server loads plain LoRA alone, not the adapter of "{method.name}": use lora or qlora'
    if method_params.dora or method_params.modules_to_save or method_params.deploy is not None:
        wrong = next(key for key in ("dora", "modules_to_save", "deploy") if getattr(method_params, key))
        return f"a vLLM server loads plain LoRA alone, without [method] {wrong}: leave it out"
    return ""


def _open(params: VllmParams, inputs: GeneratorInputs) -> VllmGenerator:
    from distft.generation.engine_generator import engine_generator

    return VllmGenerator(params, inputs, engine_generator(inputs))


SPEC = GeneratorSpec(
    name="vllm",
    params=VllmParams,
    open=_open,
    refuses=_refuses,
    refuses_draws=_refuses_draws,
    on_this_machine=False,
    look=_look,
)
