"""Rollouts of a model that is trained whole: its weights take the place of the server's, and nothing old answers.

The server is a stand-in (`vllm_stand_in`) with transformers behind it, and with the faults that a push may have. A real
one: `tests/dist/test_vllm_rollouts.py`.
"""

from __future__ import annotations

import threading
import time
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
from distft.generation.vllm_generator import VllmGenerator
from distft.recipe import parse_recipe

STEPS = [
    "/pause", "/update_weight_version", "/weight_checker", "/reset_prefix_cache", "/resume", "/pause",
    "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume",
]  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return made(tmp_path, "full")


def steps(server: StandIn) -> list[str]:
    return [path for path, _ in server.seen if path != "/inference/v1/generate"]


def kept(trained: Trained) -> list[str]:
    return sorted(path.name for path in (trained.inputs.folder / "policy").iterdir())


def test_answers_are_of_the_weights_as_they_are(trained: Trained) -> None:
    server, how = StandIn(trained.base), replace(HOW, max_new_tokens=6)
    vllm = trained.open(server.url)
    own = generator(trained.engine, trained.inputs.module)
    names = []
    # The second update is smaller than the bound of the proof by far: no number would tell that it was forgotten.
    for scale in (0.3, 1e-7, 0.3):
        said = vllm.generate(PROMPTS, how)
        assert said is not None
        names.append(server.version)
        assert {answer.policy for answer in said} == {server.version}
        assert kept(trained) == [server.version], "weights of earlier updates are removed"
        pairs = [(prompt.ids, answer.ids) for prompt, answer in zip(PROMPTS, said, strict=True)]
        for answer, logprobs in zip(said, own.token_logprobs(pairs, temperature=1.0) or (), strict=True):
            assert answer.logprobs == pytest.approx(logprobs, abs=5e-4)
            assert answer.ended == (answer.ids[-1] == 7)
        assert vllm.generate(PROMPTS, how) == said, "the same weights and seeds: the same answers"
        trained.update(scale)
    assert len(set(names)) == 3
    assert steps(server) == STEPS * 3, "pushed after each update, and only then"
    asked = [body for path, body in server.seen if path == "/inference/v1/generate"]
    assert {body["cache_salt"] for body in asked} == {*names, "distft-nothing"}
    assert {"top_p", "top_k", "min_p", "repetition_penalty", "temperature", "seed", "ignore_eos", "min_tokens"} <= (
        asked[-1]["sampling_params"].keys()
    )
    # What lies there from a start that was killed is gone before new weights are written: two at most.
    folder = trained.inputs.folder / "policy"
    for name in ("distft-old", "next"):
        (folder / name).mkdir()
    seen: list[list[str]] = []
    write = trained.inputs.write_model
    assert write is not None

    def noting(target: Path) -> None:
        seen.append(kept(trained))
        write(target)

    again = replace(trained, inputs=replace(trained.inputs, write_model=noting)).open(server.url)
    assert again.generate(PROMPTS, how) is not None
    assert seen == [[]]
    assert kept(trained) == [server.version]


def test_a_wrong_push_stops_the_run_however_small_the_update(trained: Trained) -> None:
    server, scale, how = StandIn(trained.base), 1e-7, replace(HOW, max_new_tokens=3)

    def fails(vllm: VllmGenerator, *skipped: str) -> str:
        trained.update(scale)
        server.skips = set(skipped)
        with pytest.raises(NumericError) as caught:
            vllm.generate(PROMPTS[:3], how)
        with pytest.raises(NumericError):
            vllm.generate(PROMPTS[:3], how)  # what was not proven is no proof the next time
        server.skips = set()
        assert vllm.generate(PROMPTS[:3], how) is not None
        return str(caught.value)

    vllm = trained.open(server.url)
    assert vllm.generate(PROMPTS[:3], how) is not None
    assert "is not the policy: its log-probabilities of" in fails(vllm, "reload_weights")
    assert "after its weights were set to zero the server still says" in fails(vllm, "reset")
    assert "after its weights were set to zero" in fails(vllm, "reset", "reload_weights")
    assert "is not the policy" in fails(vllm, "reset_prefix_cache", "cache_salt"), "old keys and values"
    server.skips = {"reset_prefix_cache"}
    trained.update(scale)
    assert vllm.generate(PROMPTS[:3], how) is not None, "of other weights' keys and values none is ever met"
    trained.update(scale)
    server.skips = {"update_weight_version"}
    with pytest.raises(MachineError, match="weights that were named distft-nothing are called distft-"):
        vllm.generate(PROMPTS[:3], how)
    server.skips = set()
    server.skips_tensor = "model.norm.weight"
    with pytest.raises(NumericError, match="is not the policy"):
        vllm.generate(PROMPTS[:3], how)
    server.skips_tensor = ""
    server.says_model = "distft-of-another-run"
    with pytest.raises(NumericError, match="an answer is of distft-of-another-run, and the policy is distft-nothing"):
        vllm.generate(PROMPTS[:3], how)
    server.says_model = None
    server.is_held = True
    with pytest.raises(MachineError, match="keeps keys and values of older weights"):
        vllm.generate(PROMPTS[:3], how)
    server.is_held = False
    assert vllm.generate(PROMPTS[:3], how) is not None
    # Another trainer's weights take the place of these: the next answers are of a new push.
    server.version = "distft-of-another-run"
    pushes = len(steps(server))
    assert vllm.generate(PROMPTS[:3], how) is not None
    assert steps(server)[pushes:] == STEPS


def test_a_server_that_comes_back_is_given_the_weights_again(trained: Trained) -> None:
    trained.update()
    first = StandIn(trained.base)
    vllm = trained.open(first.url, restart_timeout_s=60.0, connections=2, probe_prompts=1)
    whole = vllm.generate(PROMPTS, HOW)
    first.dies_after = first.answered + 3
    started: list[StandIn] = []

    def start_again() -> None:
        while not first.is_dead:
            time.sleep(0.01)
        first.kill()
        started.append(StandIn(trained.base, first.port))

    thread = threading.Thread(target=start_again)
    thread.start()
    assert vllm.generate(PROMPTS, HOW) == whole
    thread.join()
    (second,) = started
    assert steps(second) == STEPS
    asked = [body["cache_salt"] for path, body in second.seen if path == "/inference/v1/generate"]
    assert asked[0] == "distft-nothing"
    assert 2 < len(asked) < 2 + len(PROMPTS), "proven again; what the first has answered is not asked again"
    # One that was started anew between two requests, so quickly that nobody saw it gone, answers as it was started.
    version = second.version
    second.says_model = "default"
    with pytest.raises(MachineError, match="at last with it answers with the weights that it was started with"):
        vllm.generate(PROMPTS, replace(HOW, seed=4))
    second.says_model = None
    assert vllm.generate(PROMPTS, HOW) == whole
    assert second.version == version


def test_a_server_that_takes_no_weights_ends_the_run(trained: Trained) -> None:
    server = StandIn(trained.base)
    vllm = trained.open(server.url)
    server.is_development = False
    with pytest.raises(
        MachineError, match=r"takes no weights while it runs .*--enable-scale-out.*VLLM_SERVER_DEV_MODE=1"
    ):
        vllm.generate(PROMPTS, HOW)
    server.is_development = True
    write = trained.inputs.write_model
    assert write is not None

    def elsewhere(folder: Path) -> None:
        write(folder)
        for file in folder.glob("*.safetensors"):
            file.unlink()

    lost = replace(trained, inputs=replace(trained.inputs, write_model=elsewhere)).open(server.url)
    with pytest.raises(MachineError, match=r"does not read the weights in .*under the same path"):
        lost.generate(PROMPTS, HOW)
    assert server.version == "distft-nothing", "weights that were not read are no policy"


def test_the_doctor_asks_for_what_the_method_needs(trained: Trained) -> None:
    def found(url: str) -> tuple[str, str]:
        text = (
            'name = "run"\n[model]\npath = "some/model"\n[method]\nname = "full"\n[objective]\nname = "grpo"\n'
            '[data]\npacking = false\n[[data.train]]\npath = "train.jsonl"\n[rollout]\n'
            f'generator = {{ name = "vllm", url = "{url}" }}\nrewards = [{{ name = "exact_match" }}]\n'
        )
        recipe = parse_recipe(text, source="r.toml", registries=REGISTRIES)
        here = Here(rank=0, world=1, local_rank=0, env={}, options=DoctorOptions(recipe=recipe), hosts=("n1",))
        seen = [Seen(rank=0, host="n1", facts=run_look(CHECK, here))]
        ((verdict, message),) = [(one.verdict.value, one.message) for one in run_judge(CHECK, seen, here.options)]
        return verdict, message

    server = StandIn(trained.base)
    assert found(server.url) == ("ok", f"{server.url} serves base and takes weights (its own are called default)")
    server.is_development = False
    verdict, message = found(server.url)
    assert verdict == "fail"
    assert message.endswith("takes no weights while it runs (/weight_info: HTTP 404: Not Found)")
    verdict, message = found("http://8.8.8.8:8000")
    assert verdict == "fail"
    assert "8.8.8.8 is an address of the open internet, and a vLLM server that takes weights does what" in message
