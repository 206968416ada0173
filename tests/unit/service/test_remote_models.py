"""Models that a vLLM server answers for: the same answers as this process gives, through another program."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answer_process import answers, asked
from export_kit import save_adapter, save_model
from vllm_streams import StreamingStandIn

from distft.core.errors import RecipeError
from distft.service.settings import read_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("remote") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [save_adapter(base.parent / f"adapter{number}", base, seed=number) for number in range(2)]


@pytest.fixture
def server(base: Path) -> Iterator[StreamingStandIn]:
    running = StreamingStandIn(base)
    yield running
    running.kill()


def at(server: StreamingStandIn, base: Path, **changes: Any) -> dict[str, Any]:
    return {"vllm": {"url": server.url, "model": None, "key_env": None, "base": str(base)} | changes}


def completions(server: StreamingStandIn) -> list[dict[str, Any]]:
    return [body for path, body in server.seen if path == "/v1/completions"]


def test_answers_are_those_of_this_process(
    base: Path, adapters: list[Path], server: StreamingStandIn, tmp_path: Path
) -> None:
    for given in (base, *adapters):
        own = asked(given, ["the red ball", "it rained"], tmp_path, logprobs=1)
        remote = asked(given, ["the red ball", "it rained"], tmp_path, logprobs=1, **at(server, base))
        assert sorted(answers(remote)) == sorted(answers(own))  # side by side: in any order
        ends = [{event["id"]: event for event in events if event["event"] == "end"} for events in (own, remote)]
        for number in range(2):
            mine, theirs = ends[0][number], ends[1][number]
            assert (theirs["text"], theirs["num_tokens"], theirs["finish_reason"]) == (
                mine["text"], mine["num_tokens"], mine["finish_reason"],
            )  # fmt: skip
            assert [token["token"] for token in theirs["logprobs"]] == [token["token"] for token in mine["logprobs"]]
            assert all(len(token["top_logprobs"]) == 1 for token in theirs["logprobs"])
            pieces = [event["text"] for event in remote if (event["event"], event["id"]) == ("piece", number)]
            assert "".join(pieces) == theirs["text"]
        done = [event["prompt_tokens"] for event in remote if event["event"] == "done"]
        assert done == [event["prompt_tokens"] for event in own if event["event"] == "done"]
    names = [body["model"] for body in completions(server)]
    assert names[:2] == ["base", "base"]
    assert len({*names}) == 3
    assert sorted(server.adapters) == sorted({*names} - {"base"}), "each was loaded, once"
    loads = [body["lora_name"] for path, body in server.seen if path == "/v1/load_lora_adapter"]
    assert sorted(loads) == sorted(server.adapters)

    several = asked(base, ["?"], tmp_path, n=3, temperature=1.0, stop=["e"], schema={}, **at(server, base))
    assert len(answers(several)) == 3
    assert not any("e" in text for text in answers(several))
    request = completions(server)[-3]
    assert (request["n"], request["seed"], request["stop"]) == (3, 1, ["e"])
    assert request["structured_outputs"] == {"json": {}}
    assert (request["top_k"], request["repetition_penalty"], request["ignore_eos"]) == (0, 1.0, True)


def test_what_the_server_cannot_do_is_done_here(base: Path, server: StreamingStandIn, tmp_path: Path) -> None:
    dora = save_adapter(tmp_path / "dora", base, use_dora=True)
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    for given in (dora, whole):
        assert answers(asked(given, ["?"], tmp_path, **at(server, base))) == answers(asked(given, ["?"], tmp_path))
    assert completions(server) == []


def test_an_adapter_that_was_forgotten_is_loaded_again(
    base: Path, adapters: list[Path], server: StreamingStandIn, tmp_path: Path
) -> None:
    forgets = server.post

    def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions" and not [p for p, _ in server.seen if p == path]:
            server.adapters.clear()  # it was started anew
        return forgets(path, body)

    server.post = post  # pyright: ignore[reportAttributeAccessIssue]
    told = asked(adapters[0], ["?"], tmp_path, **at(server, base))
    assert answers(told) == answers(asked(adapters[0], ["?"], tmp_path))
    assert len([path for path, _ in server.seen if path == "/v1/load_lora_adapter"]) == 2


def test_faults_are_told(base: Path, adapters: list[Path], server: StreamingStandIn, tmp_path: Path) -> None:
    def refusal(given: Path = base, **changes: Any) -> tuple[str, str]:
        *_, event = asked(given, ["the"], tmp_path, **{**at(server, base), **changes})
        assert event["event"] == "refused", event
        return event["code"], event["message"]

    code, message = refusal(adapters[0], **at(server, base.parent))
    assert code == "invalid_value"
    assert str(base) in message
    code, message = refusal(**at(server, base, model="other"))
    assert "allowed: base" in message
    assert refusal(**at(server, base, key_env="NO_SUCH_KEY"))[0] == "model_unavailable"
    assert refusal(max_tokens=64)[0] == "context_length_exceeded"
    code, message = refusal(schema={"type": "array", "uniqueItems": True})
    assert (code, "uniqueItems" in message) == ("invalid_value", True)
    server.breaks_off = True
    assert "abort" in refusal()[1]
    server.breaks_off, server.loads = False, False
    code, message = refusal(adapters[0])
    assert code == "model_unavailable"
    assert "--enable-lora" in message
    server.kill()
    assert refusal()[0] == "model_unavailable"


def test_settings_name_the_server(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models.a]\npath = "demo:tiny-llama"\n[models.a.vllm]\nurl = "http://127.0.0.1:8000"\n')
    found = read_settings(file).models["a"].vllm
    assert found is not None
    assert (found.url, found.model, found.key_env) == ("http://127.0.0.1:8000", None, None)
    file.write_text('[models.a]\npath = "demo:tiny-llama"\n[models.a.vllm]\nurl = "127.0.0.1"\nkey = "x"\n')
    with pytest.raises(RecipeError) as error:
        read_settings(file)
    assert "url" in str(error.value)
    assert "key" in str(error.value)
    assert os.environ.get("NO_SUCH_KEY") is None
