"""Tools in chats: rendered by the template, read back from what a model writes, and as the `openai` client has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from service_server import ADMIN_KEY, ServiceServer, serving

from distft.core.errors import RecipeError
from distft.core.tokenizer_files import load_tokenizer
from distft.demo.files import locate_path
from distft.service.serving import AnswerService
from distft.service.tool_calls import CallForm, ToolChats, read_answer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
END = "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
LISTED = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
HERMES = (
    LISTED + TURNS + "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}" + END
)
BARE = (
    LISTED + TURNS + "{% for c in m.tool_calls or [] %}"
    '{"name": {{ c.function.name | tojson }}, "parameters": {{ c.function.arguments | tojson }}}{% endfor %}' + END
)
TAGS = LISTED + TURNS + "{% for c in m.tool_calls or [] %}<call={{ c.function.name }}>{% endfor %}" + END
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
}
ASKED = [{"role": "user", "content": "weather in Oslo?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Path(locate_path("demo:tiny-llama")))


def test_the_form_of_calls_is_the_templates(tokenizer: Any) -> None:
    marked = CallForm(before="<tool_call>", behind="</tool_call>", arguments="arguments")
    assert ToolChats(tokenizer, HERMES).form() == marked
    assert ToolChats(tokenizer, BARE).form() == CallForm(before="", behind="", arguments="parameters")
    for template, message in (
        (TURNS + END, "takes no tools"),
        (LISTED + TURNS + END, "in a form that is not read here"),
        (TAGS, "in a form that is not read here"),
        ("{{ raise_exception('no') }}", "takes no tools"),
    ):
        with pytest.raises(RecipeError, match=message):
            ToolChats(tokenizer, template).form()


@pytest.mark.parametrize("template", [HERMES, BARE])
def test_what_the_template_writes_is_read_back(tokenizer: Any, template: str) -> None:
    chats = ToolChats(tokenizer, template)
    arguments = {"place": 'Tromsø, "north" {x}', "days": [1, {"a": None}]}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    told = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"}]  # fmt: skip
    asked, whole = chats.render(ASKED, [WEATHER]), chats.render(told, [WEATHER])
    assert '"weather"' in asked
    assert whole.startswith(asked)
    assert whole.endswith("<tool>rain</s><assistant>")
    answer = read_answer(whole[len(asked) :].partition("</s>")[0], chats.form(), ["weather"])
    assert [(made["name"], json.loads(made["arguments"])) for made in answer.calls] == [("weather", arguments)]
    assert answer.content == ""
    with pytest.raises(RecipeError, match="role"):
        chats.render([{"role": "wizard", "content": ""}], [WEATHER])


def test_text_that_is_no_whole_call_stays_text() -> None:
    marked = CallForm(before="<tool_call>", behind="</tool_call>", arguments="arguments")
    one = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
    answer = read_answer(f"I look.\n{one}\n{one}", marked, ["weather"])
    assert (answer.content, [call["name"] for call in answer.calls]) == ("I look.", ["weather"] * 2)
    for text in ("no call", "<tool_call>", one[:-3],
                 one.replace('"name"', '"named"'), one + " and more", one[:20] + one,
                 one.replace("}}", "}, \"x\": 1}"), "<tool_call>" + "[" * 100_000):  # fmt: skip
        answer = read_answer(text, marked, ["weather"])
        assert (answer.content, answer.calls) == (text, ())
    bare = CallForm(before="", behind="", arguments="parameters")
    call = '{"name": "weather", "parameters": {"place": "Oslo"}}'
    assert len(read_answer(f" {call}\n", bare, ["weather"]).calls) == 1
    for text in (call + " then", f"so: {call}", '{"place": "Oslo"}', call.replace("weather", "other"), "{"):
        assert read_answer(text, bare, ["weather"]).calls == ()


CALL = {"name": "weather", "arguments": '{"place": "Oslo"}'}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServiceServer, list[dict[str, Any]]]]:
    """A server whose answers are written by this test; what reaches the process that answers is kept."""
    asked: list[dict[str, Any]] = []

    def answer(self: AnswerService, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked.append(request)
        calls = (CALL, CALL) if request.get("tools") else None
        if calls is None:
            yield {"event": "piece", "index": 0, "text": "hm"}
        reason = "tool_calls" if calls else "stop"
        more = {"calls": calls} if calls else {}
        yield {
            "event": "end",
            "index": 0,
            "text": "hm",
            "num_tokens": 3,
            "finish_reason": reason,
            "logprobs": None,
            **more,
        }
        yield {"event": "done", "prompt_tokens": 4}

    monkeypatch.setattr(AnswerService, "answer", answer)
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path) as running:
        yield running, asked


def test_the_client_gets_calls_and_sends_their_results(server: tuple[ServiceServer, list[dict[str, Any]]]) -> None:
    running, asked = server
    with running.client() as client:
        create = client.chat.completions.create
        given: Any = {"model": "tiny", "messages": ASKED, "tools": [WEATHER]}
        choice = create(**given).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "hm")
        assert choice.message.tool_calls is not None
        made = choice.message.tool_calls
        assert [(call.type, call.function.name, call.function.arguments) for call in made] == [
            ("function", "weather", '{"place": "Oslo"}')
        ] * 2
        assert len({call.id for call in made}) == 2
        assert asked[-1]["tools"] == [WEATHER]
        deltas = [piece.choices[0] for piece in create(**given, stream=True)]
        streamed = [call for choice in deltas for call in choice.delta.tool_calls or ()]
        assert [(call.index, call.function.name, call.function.arguments) for call in streamed] == [
            (0, "weather", '{"place": "Oslo"}'), (1, "weather", '{"place": "Oslo"}')
        ]  # fmt: skip
        assert "".join(choice.delta.content or "" for choice in deltas) == "hm"
        assert deltas[-1].finish_reason == "tool_calls"
        back: Any = [*ASKED, choice.message.model_dump(exclude_none=True),
                     *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in made)]  # fmt: skip
        create(model="tiny", messages=back, tools=[WEATHER])
        assert [message["role"] for message in asked[-1]["messages"]] == ["user", "assistant", "tool", "tool"]
        assert asked[-1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"place": "Oslo"}'
        plain = create(**given, tool_choice="none").choices[0]
        assert (plain.finish_reason, plain.message.tool_calls) == ("stop", None)
        assert "tools" not in asked[-1]
        create(model="tiny", messages=ASKED, tools=[], response_format={"type": "text"}, parallel_tool_calls=False)
        assert asked[-1]["schema"] is None
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        create(model="tiny", messages=ASKED, response_format=form)
        assert asked[-1]["schema"] == schema
        in_json: Any = [{"role": "user", "content": "Answer as JSON."}]
        create(model="tiny", messages=in_json, response_format={"type": "json_object"})
        assert asked[-1]["schema"] == {"type": "object"}
        count = len(asked)
        refusals: list[tuple[dict[str, Any], str]] = [
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
            ({"parallel_tool_calls": False}, "parallel_tool_calls"),
            ({"tools": [{"type": "function", "function": {**WEATHER["function"], "strict": True}}]}, "strict"),
            ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
            ({"functions": [WEATHER["function"]], "tools": []}, "functions"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
                "response_format",
            ),
            ({"response_format": {"type": "json_object"}, "tools": []}, "messages"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format"),
            ({"messages": [*ASKED, {"role": "tool", "content": "rain"}]}, "messages"),
            ({"messages": [*ASKED, {"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages"),
            ({"messages": [*ASKED, {"role": "assistant"}]}, "messages"),
        ]
        for change, param in refusals:
            with pytest.raises(openai.BadRequestError) as refused:
                create(**{**given, **change})
            assert param in str(refused.value.param), change
        assert len(asked) == count
