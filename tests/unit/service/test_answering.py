"""Adapters beside one base, and routers, are asked as models: each answers as `distft chat` and PEFT do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_process import answers, asked
from peft import PeftModel
from routers import ASKS, requests, write_router
from transformers import AutoModelForCausalLM

from distft.chat.models import ChatModels
from distft.core.errors import RecipeError
from distft.generation.completion import SamplingParams
from distft.service.loaded_models import LoadedModels
from distft.service.settings import read_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_router(tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_router(tmp_path_factory.mktemp("by-token"), 'per = "token"')


def test_answers_are_those_of_the_chosen_adapters(world: Path, tmp_path: Path) -> None:
    models = ChatModels(str(world / "router"), {}, tmp_path, with_base=True)
    prompts = [requests(name, 1, 7)[0]["prompt"] for name in ASKS]
    how = SamplingParams(max_new_tokens=6)
    wanted = []
    for name, prompt in zip(ASKS, prompts, strict=True):
        reply = models.reply("tuned", [{"role": "user", "content": prompt}], how, lambda piece: None)
        assert reply.chosen == name
        wanted.append(reply.text)
    events = asked(world / "router", prompts, tmp_path)
    assert answers(events) == wanted
    assert len(set(wanted)) > 1, "adapters of random numbers answer differently"
    for number, text in enumerate(wanted):
        pieces = [event["text"] for event in events if event["event"] == "piece" and event["id"] == number]
        assert "".join(pieces) == text
    scored = asked(world / "router", prompts[:1], tmp_path, logprobs=1)
    (end,) = (event for event in scored if event["event"] == "end")
    assert end["text"] == wanted[0]
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in end["logprobs"]), "greedy"


def test_tools_are_rendered_by_the_template_or_refused(world: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    given: Any = {"tools": [tool], "speaks_of_tools": True}
    (refused,) = asked(world / "router", ["?"], tmp_path, **given)
    assert (refused["event"], refused["code"]) == ("refused", "invalid_value")
    assert "takes no tools" in refused["message"]
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        encoding="utf-8",
    )
    *pieces, end, done = asked(world / "router", ["?"], tmp_path, **given, chat_template=str(template))
    assert (pieces, end["event"], end["calls"]) == ([], "end", []), "an answer that calls nothing comes at its end"
    assert end["text"]
    bare = asked(world / "router", ["?"], tmp_path, chat_template=str(template))[-1]
    assert done["prompt_tokens"] > bare["prompt_tokens"] + 10, "the tools are in the prompt"


def test_adapters_stand_beside_one_base_and_the_oldest_makes_room(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, too, which came with the base."""
    monkeypatch.setattr("distft.service.loaded_models.MOST_ADAPTERS", 2)
    models, ids = LoadedModels(tmp_path), torch.arange(5, 15)[None]
    bases = set[int]()
    for name in ("red", "dog", "rain", "red", "dog"):
        served = models.get(str(world / name))
        with models.using(served, []) as lm, torch.no_grad():
            logits = lm(input_ids=ids).logits
            bases.add(id(lm))
        lone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), world / name)
        with torch.no_grad():
            assert torch.allclose(logits, lone(input_ids=ids).logits, atol=1e-5), name
    assert len(bases) == 1


@pytest.mark.slow
def test_a_choice_for_each_token(by_token: Path, tmp_path: Path) -> None:
    models = ChatModels(str(by_token / "router"), {}, tmp_path, with_base=True)
    prompts = [requests(name, 1, 8)[0]["prompt"] for name in ASKS]
    how = SamplingParams(max_new_tokens=6)
    wanted = []
    for prompt in prompts:
        wanted.append(models.reply("tuned", [{"role": "user", "content": prompt}], how, lambda piece: None).text)
    assert answers(asked(by_token / "router", prompts, tmp_path)) == wanted
    (event,) = asked(by_token / "router", prompts[:1], tmp_path, logprobs=0)
    assert (event["event"], event["message"]) == ("refused", "A router that chooses for each token gives no logprobs.")


def test_no_job_is_made_of_a_router(world: Path, tmp_path: Path) -> None:
    settings = tmp_path / "models.toml"
    settings.write_text(f'[models.routed]\npath = "{world / "router"}"\n')
    with pytest.raises(RecipeError, match=r"line 1 .*is a router, of which no job can be made: methods = \[\]"):
        read_settings(settings)
    settings.write_text(f'[models.routed]\npath = "{world / "router"}"\nmethods = []\n')
    assert read_settings(settings).models["routed"].methods == ()


def test_checkpoints_of_one_name_are_put_together_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs have a checkpoint of the same step, and an earlier server may have left one of it."""
    places: list[tuple[Path, list[Path]]] = []

    def opened(given: str, workdir: Path) -> Any:
        places.append((workdir, list(workdir.iterdir())))
        (workdir / Path(given).name).mkdir()
        raise RecipeError(given, [])

    monkeypatch.setattr("distft.service.loaded_models.open_source", opened)
    for given in (
        "jobs/a/checkpoints/step-00000144",
        "jobs/b/checkpoints/step-00000144",
        "jobs/a/checkpoints/step-00000144",
    ):
        with pytest.raises(RecipeError):
            LoadedModels(tmp_path).get(given)
    assert [content for _, content in places] == [[], [], []]
    assert places[0][0] != places[1][0]


SCHEMA = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["level", "count"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema(world: Path, by_token: Path, tmp_path: Path) -> None:
    """The model is of random numbers: what it would write freely is no JSON."""
    how = {"temperature": 1.0, "n": 3, "max_tokens": 60, "default_tokens": 60}
    assert not any(text.startswith("{") for text in answers(asked(world / "router", ["?"], tmp_path, **how)))
    events = asked(world / "router", ["?", "!"], tmp_path, schema=SCHEMA, logprobs=1, **how)
    made = [json.loads(text) for text in answers(events)]
    assert len(made) == 6
    assert all(sorted(entry) == ["count", "level"] for entry in made)
    assert {entry["level"] for entry in made} == {"low", "high"}
    assert all(type(entry["count"]) is int and 0 <= entry["count"] <= 99 for entry in made)
    assert {event["finish_reason"] for event in events if event["event"] == "end"} == {"stop"}
    for number in range(2):  # as streamed
        for row in range(3):
            pieces = [e["text"] for e in events if e["event"] == "piece" and (e["id"], e["index"]) == (number, row)]
            assert json.loads("".join(pieces)) in made
    assert answers(asked(world / "router", ["?"], tmp_path, schema=SCHEMA, **how)) == answers(events)[:3], "seeded"
    (cut,) = (e for e in asked(world / "router", ["?"], tmp_path, schema=SCHEMA, max_tokens=3) if e["event"] == "end")
    assert (cut["finish_reason"], cut["num_tokens"]) == ("length", 3)

    for wrong, words in (({"type": "text"}, "text"), ({"type": "array", "uniqueItems": True}, "uniqueItems")):
        (refused,) = asked(world / "router", ["?"], tmp_path, schema=wrong)
        assert (refused["event"], refused["code"], refused["param"]) == (
            "refused", "invalid_value", "response_format.json_schema.schema",
        )  # fmt: skip
        assert words in refused["message"]
    (refused,) = asked(by_token / "router", ["?"], tmp_path, schema=SCHEMA)
    assert "response_format" in refused["message"]
