"""The exact text that is trained, for every built-in template and every loss_on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from data_kit import save_tokenizer

from distft.core.errors import DataError
from distft.data.chat import conversation
from distft.data.render import Renderer, load_renderer
from distft.data.samples import Conversation, RowError
from distft.data.templates import BUILT_IN, read_template

TOOLS = [{"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}}]
CHAT = conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello 🌞!"},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ],
    TOOLS,
)
CALL = {
    "chatml": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Rome"}}',
    "plain": 'Call: {"name": "weather", "arguments": {"city": "Rome"}}',
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "</s>"}


def trained_texts(renderer: Renderer, chat: Conversation) -> list[str]:
    """The text of each run of trained tokens."""
    rendered = renderer.render(chat)
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(rendered.ids_T.tolist(), rendered.trained_T.tolist(), strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return [renderer.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", BUILT_IN)
@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_turn"])
def test_trained_text_is_exactly_the_turns_and_their_end_token(template: str, loss_on: str, tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer, chat_template=template, loss_on=loss_on)
    end = END[template]
    turns = ["Hello 🌞!" + end, CALL[template] + end, "Sunny." + end]
    wanted = {"assistant": turns, "completion": turns[1:], "last_turn": turns[2:]}[loss_on]
    assert trained_texts(renderer, CHAT) == wanted


@pytest.mark.parametrize("template", BUILT_IN)
def test_all_trains_every_token(template: str, tokenizer: Path) -> None:
    rendered = load_renderer(tokenizer, chat_template=template, loss_on="all").render(CHAT)
    assert rendered.trained_T.all()


def test_whole_text_of_each_template(tokenizer: Path) -> None:
    chat = conversation(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A"},
        ]
    )
    rendered = {
        name: renderer.tokenizer.decode(renderer.render(chat).ids_T)
        for name in BUILT_IN
        for renderer in [load_renderer(tokenizer, chat_template=name)]
    }
    assert rendered == {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        "plain": "<s>System:\nS\n\nUser:\nU\n\nAssistant:\nA</s>\n\n",
    }


@pytest.mark.parametrize("template", BUILT_IN)
def test_generation_prompt_is_what_precedes_the_trained_tokens(template: str, tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer, chat_template=template, loss_on="last_turn")
    before, _ = renderer.template.draw(CHAT.messages[:-1], CHAT.tools, True)
    rendered = renderer.render(CHAT)
    prompt_ids = renderer.tokenizer(before, add_special_tokens=False)["input_ids"]
    assert rendered.ids_T[: int(np.argmax(rendered.trained_T))].tolist() == prompt_ids


@pytest.mark.parametrize("template", BUILT_IN)
@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_turn"])
def test_without_marks_the_mask_is_the_same(template: str, loss_on: str, tokenizer: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jinja"
    bare.write_text(re.sub(r"\{%-? *(end)?generation *-?%\}", "", read_template(template) or ""))
    marked = load_renderer(tokenizer, chat_template=template, loss_on=loss_on).render(CHAT)
    derived = load_renderer(tokenizer, chat_template=str(bare), loss_on=loss_on)
    assert not derived.template.marked
    unmarked = derived.render(CHAT)
    assert unmarked.ids_T.tolist() == marked.ids_T.tolist()
    assert unmarked.trained_T.tolist() == marked.trained_T.tolist()


def test_prompt_messages_of_a_pair_are_never_trained(tokenizer: Path) -> None:
    chat = Conversation(messages=CHAT.messages, tools=CHAT.tools, num_prompt=4)
    renderer = load_renderer(tokenizer, chat_template="chatml", loss_on="assistant")
    assert trained_texts(renderer, chat) == [CALL["chatml"] + "<|im_end|>", "Sunny.<|im_end|>"]


def test_own_template_of_the_tokenizer(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t", chat_template=read_template("chatml"), eos_token="<|im_end|>")
    assert trained_texts(load_renderer(folder, loss_on="last_turn"), CHAT) == ["Sunny.<|im_end|>"]


BAD_TEMPLATES = {
    "end token outside the marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
        r"bad.jinja\": its \{% generation %\} marks leave out '<\|im_end\|>'",
    ),
    "no end token": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        r"bad.jinja\": writes nothing after an assistant turn",
    ),
    "end token the tokenizer lacks": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}",
        r"ends an assistant turn with '<\|end\|>', which is no token of this tokenizer",
    ),
    "earlier turns change when others follow": (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content | upper }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        r"renders messages up to 2 differently when others follow.*put \{% generation %\} marks",
    ),
    "syntax": ("{% for m in messages %}", r"bad.jinja\": the chat template refuses it"),
    "ignores the answer": ("{{ messages[0].content }}</s>", r"does not render what the assistant says"),
    "marks one turn of two": (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        r"marks 1 of 2 assistant turns",
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_cannot_teach_stopping_is_an_error(name: str, tokenizer: Path, tmp_path: Path) -> None:
    text, message = BAD_TEMPLATES[name]
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = conversation([{"role": role, "content": content} for role, content in turns])
    with pytest.raises(DataError, match=message):
        load_renderer(tokenizer, chat_template=str(path)).render(chat)


def test_tools_that_the_template_would_leave_out_are_an_error(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "simple.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    renderer = load_renderer(tokenizer, chat_template=str(path))
    with pytest.raises(DataError, match='does not render "tools"'):
        renderer.render(CHAT)
    with pytest.raises(DataError, match=r'does not render tool_calls.*: chat_template = "chatml"'):
        renderer.render(Conversation(messages=CHAT.messages))
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    with pytest.raises(DataError, match="does not render reasoning_content, so those turns would be trained without"):
        renderer.render(conversation([{"role": "user", "content": "2 + 2?"}, thought]))


def test_what_the_template_refuses_is_the_rows_fault(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    chat = conversation([{"role": r, "content": "x"} for r in ("system", "user", "assistant")])
    with pytest.raises(RowError, match="no system here"):
        load_renderer(tokenizer, chat_template=str(path)).render(chat)


@pytest.mark.row(34)
def test_no_template_names_the_built_in_ones(tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"has no chat template.*chatml, llama3, plain"):
        load_renderer(tokenizer).render(CHAT)
