"""Rollouts from a server: weights pushed, digests said, wrong weights and restarts noticed, ids in and ids out.

The server is a stand-in with transformers and PEFT behind it (`vllm_stand_in`), so that its log-probabilities are not
made by the code under test. A real one: `tests/unit/generation/test_vllm_server.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from generating import generator
from vllm_stand_in import StandIn
from vllm_trained import HOW, PROMPTS, Trained, made

from distft.catalog import REGISTRIES
from distft.core.errors import MachineError, NumericError
from distft.doctor.checks.generator import CHECK
from distft.doctor.finding import DoctorOptions, Here, Seen, run_judge, run_look
from distft.engine.solo import SoloEngine
from distft.generation import vllm_generator
from distft.recipe import parse_recipe

RECIPE = """
name = "run"
[model]
path = "some/model"
[method]
name = "lora"
[objective]
name = "grpo"
[data]
packing = false
[[data.train]]
path = "train.jsonl"
[rollout]
generator = GENERATOR
rewards = [{ name = "exact_match" }]
"""


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return made(tmp_path, "lora")


def test_answers_are_of_the_policy_as_it_is(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandIn(trained.base)
    vllm = trained.open(server.url)
    own = generator(trained.engine, trained.inputs.module)
    names = []
    for temperature in (1.0, 0.7):
        how = replace(HOW, temperature=temperature)
        said = vllm.generate(PROMPTS, how)
        assert said is not None
        (name,) = server.adapters
        names.append(name)
        pairs = [(prompt.ids, one.ids) for prompt, one in zip(PROMPTS, said, strict=True)]
        for one, logprobs in zip(said, own.token_logprobs(pairs, temperature=temperature) or (), strict=True):
            assert one.logprobs == pytest.approx(logprobs, abs=5e-4)
            assert one.ended == (one.ids[-1] == 7)
            assert one.text == " ".join(str(token) for token in one.ids if token != 7)
            assert one.num_tokens == len(one.ids) == len(one.logprobs) <= 12
        assert len({one.ids for one in said}) == len(PROMPTS), "each answer has a seed of its own"
        assert vllm.generate(PROMPTS, how) == said, "the same weights and seeds: the same answers"
        assert vllm.generate(PROMPTS, replace(how, seed=4)) != said
        trained.update()
    assert names[0] != names[1], "an adapter is called after its weights"
    assert sorted(path.name for path in (trained.inputs.folder / "policy").iterdir()) == [names[1]]
    loads = [body["lora_name"] for path, body in server.seen if path == "/v1/load_lora_adapter"]
    assert loads == names, "pushed after each update, and only then"
    (last,) = [body for path, body in server.seen if path == "/v1/completions"][-1:]
    assert {"top_p", "top_k", "min_p", "repetition_penalty", "temperature", "seed", "ignore_eos"} <= last.keys()
    assert all(isinstance(token, int) for token in last["prompt"])
    # However often the ranks meet meanwhile, and when one of them wants to stop.
    whole = vllm.generate(PROMPTS, HOW)
    monkeypatch.setattr(vllm_generator, "SLICE_S", 0.001)
    assert vllm.generate(PROMPTS, HOW) == whole
    with monkeypatch.context() as other_rank:
        other_rank.setattr(SoloEngine, "sum_over_ranks", lambda *_: [1.0])
        assert vllm.generate(PROMPTS, HOW) is None
    assert vllm.generate(PROMPTS, HOW) == whole
    # A server that has another run's adapters keeps them.
    server.adapters["distft-0"] = "/elsewhere/distft-0"
    assert vllm.generate(PROMPTS, HOW) is not None
    assert len(server.adapters) == 2
    assert "distft-0" in server.adapters


def test_wrong_weights_and_names_stop_the_run(trained: Trained) -> None:
    server = StandIn(trained.base)
    server.ignores_adapters = True
    vllm = trained.open(server.url)
    assert vllm.generate(PROMPTS, HOW) is not None, "an adapter that starts as nothing is its base"
    trained.update()
    with pytest.raises(
        NumericError, match=r"is not the policy: its log-probabilities of \d+ tokens are .* 0\.001"
    ) as e:
        vllm.generate(PROMPTS, HOW)
    assert e.value.exit_code == 5
    with pytest.raises(NumericError, match="is not the policy"):
        vllm.generate(PROMPTS, HOW)  # what was not proven is no proof the next time
    server.ignores_adapters = False
    assert vllm.generate(PROMPTS, HOW) is not None
    server.says_model = "distft-of-yesterday"
    with pytest.raises(NumericError, match="an answer is of distft-of-yesterday, and the policy is distft-"):
        vllm.generate(PROMPTS, HOW)
    server.says_model = None
    server.raw_logprobs = True
    assert vllm.generate(PROMPTS, HOW) is not None
    trained.update()
    with pytest.raises(NumericError, match="--logprobs-mode processed_logprobs"):
        vllm.generate(PROMPTS, replace(HOW, temperature=0.6))
    assert vllm.generate(PROMPTS, replace(HOW, top_p=0.5)) is not None, "as of all tokens, which is its default"
    server.raw_logprobs = False
    trained.update()
    with pytest.raises(NumericError, match="--logprobs-mode raw_logprobs"):
        vllm.generate(PROMPTS, replace(HOW, top_p=0.5))


def test_a_server_that_comes_back_is_pushed_to_again(trained: Trained) -> None:
    trained.update()
    first = StandIn(trained.base)
    port = first.port
    vllm = trained.open(first.url, restart_timeout_s=60.0, connections=2, probe_prompts=1)
    whole = vllm.generate(PROMPTS, HOW)
    first.dies_after = first.answered + 3
    started: list[StandIn] = []

    def start_again() -> None:
        while not first.is_dead:
            time.sleep(0.01)
        first.kill()
        started.append(StandIn(trained.base, port))

    thread = threading.Thread(target=start_again)
    thread.start()
    assert vllm.generate(PROMPTS, HOW) == whole
    thread.join()
    (second,) = started
    paths = [path for path, _ in second.seen]
    assert paths[0] == "/v1/load_lora_adapter"
    assert paths.count("/v1/load_lora_adapter") == 1
    asked = [body for path, body in second.seen if path == "/v1/completions"]
    assert 1 < len(asked) < 1 + len(PROMPTS), "proven again; what the first has answered is not asked again"


def test_a_server_that_stays_away_or_refuses_ends_the_run(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandIn(trained.base)

    def said(vllm: Callable[[], object]) -> str:
        with pytest.raises(MachineError) as caught:
            vllm()
        assert caught.value.exit_code == 9
        return str(caught.value)

    vllm = trained.open(server.url)
    server.loads = False
    assert "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in said(lambda: vllm.generate(PROMPTS, HOW))
    server.loads = True
    monkeypatch.setattr(StandIn, "_complete", lambda *_: {"finish_reason": "stop"})
    assert "lacks token ids or log-probabilities" in said(lambda: vllm.generate(PROMPTS, HOW))
    ended = {"finish_reason": "stop", "stop_reason": None, "token_ids": [9], "logprobs": {"token_logprobs": [-1.0]}}
    monkeypatch.setattr(StandIn, "_complete", lambda _, lm, body: ended | {"prompt_token_ids": body["prompt"]})
    assert "ended with token 9, which ends none here" in said(lambda: vllm.generate(PROMPTS, HOW))
    monkeypatch.setattr(StandIn, "_complete", lambda _, lm, body: ended | {"prompt_token_ids": [1]})
    with pytest.raises(NumericError, match="the server read 1 tokens where"):
        vllm.generate(PROMPTS, HOW)
    monkeypatch.setattr(StandIn, "post", lambda *_: (500, {"error": {"message": "EngineCore has died"}}))
    assert "4 times in a row before it had answered anything, at last with HTTP 500: EngineCore" in said(
        lambda: vllm.generate([replace(PROMPTS[0], ids=[3, 4])], HOW)
    )
    server.kill()
    assert "no vLLM server has answered for 1 s" in said(lambda: vllm.generate(PROMPTS, HOW))
    stopping = trained.open(server.url, restart_timeout_s=60.0)
    monkeypatch.setattr(stopping, "_inputs", replace(trained.inputs, stop=lambda: True))
    assert stopping.generate(PROMPTS, HOW) is None
    assert "NO_SUCH_KEY is not set" in said(lambda: trained.open(server.url, api_key_env="NO_SUCH_KEY"))


def test_the_doctor_asks_the_server(tmp_path: Path, trained: Trained) -> None:
    def found(url: str, generator: str = "vllm") -> list[tuple[str, str]]:
        text = RECIPE.replace("GENERATOR", f'{{ name = "vllm", url = "{url}" }}' if generator == "vllm" else '"engine"')
        recipe = parse_recipe(text, source="r.toml", registries=REGISTRIES)
        here = Here(rank=0, world=1, local_rank=0, env={}, options=DoctorOptions(recipe=recipe), hosts=("n1",))
        seen = [Seen(rank=0, host="n1", facts=run_look(CHECK, here))]
        return [(finding.verdict.value, finding.message) for finding in run_judge(CHECK, seen, here.options)]

    server = StandIn(trained.base)
    assert found(server.url) == [("ok", f"{server.url} serves base and loads adapters")]
    server.loads = False
    ((verdict, message),) = found(server.url)
    assert verdict == "fail"
    assert message.endswith("loads no adapters while it runs")
    server.kill()
    ((verdict, message),) = found(server.url)
    assert verdict == "fail"
    assert "no vLLM server answers (ConnectionRefusedError" in message
    assert found(server.url, generator="engine") == [("ok", "answers come from no server")]
