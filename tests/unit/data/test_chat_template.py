"""What is trained under templates of the shapes that models come with: nothing to be learnt is lost in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_templates as shapes
import pytest

from distft.core.errors import DataError
from distft.data import chat_template, template_content
from distft.data.chat import conversation
from distft.data.render import Renderer, load_renderer
from distft.data.rendered import Rendered
from distft.data.samples import RowError

Make = Callable[..., Renderer]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALLS = [{"function": {"name": "find", "arguments": {"city": "Oslo"}}}]
TWO = [user("one?"), says("1"), user("two?"), says("2")]
THOUGHT = [user("one?"), says("1", reasoning="count"), user("two?"), says("2", thinking="count on")]
INLINE = [user("one?"), says("<think>\ncount\n</think>\n\n1"), user("two?"), says("<think>\ncount on\n</think>\n\n2")]
CALLING = [user("where?"), says("", tool_calls=CALLS), {"role": "tool", "content": "north"}, says("In the north.")]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A renderer for a template's text."""
    made: dict[str, Path] = {}

    def renderer(template: str, **settings: Any) -> Renderer:
        if template not in made:
            made[template] = shapes.save_tokenizer(tmp_path_factory.mktemp("t"), template)
        return load_renderer(made[template], **settings)

    return renderer


def shown(renderer: Renderer, row: Rendered) -> str:
    """The row's text, what is trained between brackets."""
    text, before = "", False
    pieces: list[tuple[bool, list[int]]] = []
    for token, trained in zip(row.ids_T.tolist(), row.trained_T.tolist(), strict=True):
        if not pieces or trained != before:
            pieces.append((trained, []))
        pieces[-1][1].append(token)
        before = trained
    for trained, ids in pieces:
        text += f"⟦{renderer.tokenizer.decode(ids)}⟧" if trained else renderer.tokenizer.decode(ids)
    return text


def rows(renderer: Renderer, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    (made,) = renderer.render_rows([conversation(messages, **more)])
    if isinstance(made, Exception):
        raise made
    return [shown(renderer, row) for row in made]


def ends(texts: list[str]) -> list[str]:
    """What is trained in each row."""
    return ["|".join(part.split("⟧")[0] for part in text.split("⟦")[1:]) for text in texts]


def notes(renderer: Renderer, messages: list[dict[str, Any]]) -> set[str]:
    (made,) = renderer.render_rows([conversation(messages)])
    assert not isinstance(made, Exception)
    return {kind for row in made for kind in row.notes}


TRAINED = {
    "qwen3, plain": (shapes.QWEN3, TWO, [f"<think>\n\n</think>\n\n{n}<|im_end|>" for n in (1, 2)]),
    "qwen3, reasoning": (
        shapes.QWEN3,
        THOUGHT,
        ["<think>\ncount\n</think>\n\n1<|im_end|>", "<think>\ncount on\n</think>\n\n2<|im_end|>"],
    ),
    "qwen3, inline": (
        shapes.QWEN3,
        INLINE,
        ["<think>\ncount\n</think>\n\n1<|im_end|>", "<think>\ncount on\n</think>\n\n2<|im_end|>"],
    ),
    "r1, plain": (shapes.R1, TWO, [f"\n</think>\n\n{n}</s>" for n in (1, 2)]),
    "r1, reasoning": (shapes.R1, THOUGHT, ["count\n</think>\n\n1</s>", "count on\n</think>\n\n2</s>"]),
    "r1, inline": (shapes.R1, INLINE, ["count\n</think>\n\n1</s>", "count on\n</think>\n\n2</s>"]),
    "gpt-oss, plain": (shapes.GPT_OSS, TWO, [f"<|channel|>final<|message|>{n}<|return|>" for n in (1, 2)]),
    "gpt-oss, reasoning": (
        shapes.GPT_OSS,
        THOUGHT[:2],
        ["<|channel|>analysis<|message|>count<|end|><|start|>assistant<|channel|>final<|message|>1<|return|>"],
    ),
    "gpt-oss, call": (
        shapes.GPT_OSS,
        CALLING,
        [
            ' to=functions.find<|channel|>commentary<|message|>{"city": "Oslo"}<|call|>|'
            "<|channel|>final<|message|>In the north.<|return|>"
        ],
    ),
    "phi-3": (shapes.PHI3, TWO, ["1<|end|>|2<|end|>"]),
    "glm-4": (shapes.GLM4, TWO, ["\n1<|user|>|\n2<|user|>"]),
    "glm-4, call": (shapes.GLM4, CALLING, ['find\n{"city": "Oslo"}<|observation|>|\nIn the north.<|user|>']),
    "glm-4.6": (shapes.GLM46, TWO, ["\n<think></think>\n1<|user|>|\n<think></think>\n2<|user|>"]),
    "glm-4.6, reasoning": (
        shapes.GLM46,
        THOUGHT,
        ["\n<think>count</think>\n1<|user|>", "\n<think>count on</think>\n2<|user|>"],
    ),
    "glm-4.6, call": (
        shapes.GLM46,
        CALLING,
        [
            '\n<think></think>\n<tool_call>find\n{"city": "Oslo"}\n</tool_call><|observation|>|'
            "\n<think></think>\nIn the north.<|user|>"
        ],
    ),
    "r1, call": (
        shapes.R1,
        CALLING[:2],
        ['\n</think>\n\n<tool_call>find{"city": "Oslo"}</tool_call></s>'],
    ),
    "mistral": (shapes.MISTRAL, TWO, [" 1</s>| 2</s>"]),
    "mistral 0.3": (shapes.MISTRAL3, TWO, [" 1</s>| 2</s>"]),
    "mistral 0.3, system": (
        shapes.MISTRAL3,
        [{"role": "system", "content": "Be brief."}, *TWO],
        [" 1</s>", " 2</s>"],
    ),
    "llama 3.1": (shapes.LLAMA31, TWO, ["1<|eot_id|>|2<|eot_id|>"]),
}


@pytest.mark.parametrize("name", TRAINED)
def test_each_turn_is_trained_as_it_is_to_be_written(name: str, make: Make) -> None:
    template, messages, trained = TRAINED[name]
    renderer = make(template, date="2026-01-31")
    assert ends(rows(renderer, messages)) == trained


@pytest.mark.parametrize("name", TRAINED)
def test_the_generation_prompt_stands_before_each_trained_turn(name: str, make: Make) -> None:
    template, messages, _ = TRAINED[name]
    renderer = make(template, date="2026-01-31", loss_on="last_turn")
    sample = conversation(messages)
    (row,) = renderer.render_rows([sample])[0]
    assert renderer.ask(sample)[1] == row.ids_T[: int(row.trained_T.argmax())].tolist()


@pytest.mark.parametrize("template", [shapes.QWEN3, shapes.GPT_OSS, shapes.PHI3, shapes.MISTRAL, shapes.GLM4])
def test_the_text_is_transformers_own(template: str, make: Make) -> None:
    renderer = make(template, loss_on="last_turn")
    ids = renderer.tokenizer.apply_chat_template([user("one?"), says("1")], return_dict=False)
    (row,) = renderer.render_rows([conversation([user("one?"), says("1")])])[0]
    header = 1 if template == shapes.GLM4 else 0  # the next header, which stops the model, is trained too
    assert row.ids_T[: len(row.ids_T) - header].tolist() == ids


def test_a_split_is_said_once_and_shared_by_no_other_setting(make: Make) -> None:
    assert notes(make(shapes.QWEN3), TWO) == {chat_template.SPLIT}
    assert notes(make(shapes.QWEN3), THOUGHT) == {chat_template.SPLIT, template_content.CUT.format("reasoning")}
    assert notes(make(shapes.QWEN3, loss_on="last_turn"), THOUGHT) == {template_content.CUT.format("reasoning")}
    assert notes(make(shapes.PHI3), TWO) == set()
    assert chat_template.OPENED in notes(make(shapes.R1), TWO)
    assert chat_template.OPENED not in notes(make(shapes.R1), THOUGHT)


@pytest.mark.parametrize("template", [shapes.QWEN3, shapes.R1])
@pytest.mark.parametrize("chat", [THOUGHT, INLINE])
def test_all_keeps_reasoning_or_is_an_error(template: str, chat: list[dict[str, Any]], make: Make) -> None:
    renderer = make(template, loss_on="all")
    (text,) = rows(renderer, chat[:2])
    assert "count\n</think>\n\n1" in text
    with pytest.raises(RowError, match=r'message 2 .* leaves out its reasoning: "count"  loss_on = "assistant" trains'):
        rows(renderer, chat)


LOST = {
    "reasoning, no place": (
        shapes.PHI3,
        THOUGHT,
        DataError,
        "does not render reasoning_content, so .* <think>…</think>",
    ),
    "reasoning, marked": ("chatml", THOUGHT, DataError, "does not render reasoning_content"),
    "text beside a call": (
        shapes.LLAMA31,
        [user("a"), says("Let me look.", tool_calls=CALLS), {"role": "tool", "content": "x"}, says("b")],
        RowError,
        r'message 2 \(assistant\): the chat template leaves out its content: "Let me look."  name a chat_template that',
    ),
    "a second call": (
        shapes.GPT_OSS,
        [user("a"), says("", tool_calls=[*CALLS, {"function": {"name": "walk", "arguments": {}}}])],
        RowError,
        r'message 2 \(assistant\): the chat template leaves out its tool call: "walk"',
    ),
    "a system message": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}",
        [{"role": "system", "content": "Be brief."}, *TWO],
        RowError,
        r'message 1 \(system\): the chat template leaves out its content: "Be brief."  move it into',
    ),
    "a system message, all": (
        shapes.MISTRAL3,
        [{"role": "system", "content": "Be brief."}, *TWO],
        RowError,
        r'message 1 \(system\): the chat template leaves out its content: "Be brief."  move it into',
    ),
    "who is speaking": (
        shapes.PHI3,
        [{**user("a"), "name": "ann"}, says("b")],
        RowError,
        r'message 1: the chat template does not render name \("ann"\)  ignore = \["name"\]',
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_is_an_error_with_a_remedy(name: str, make: Make, tokenizer: Path) -> None:
    template, messages, kind, message = LOST[name]
    loss_on = "all" if name.endswith(", all") else "assistant"
    own = load_renderer(tokenizer, chat_template="chatml") if template == "chatml" else make(template, loss_on=loss_on)
    with pytest.raises(kind, match=message) as raised:
        rows(own, messages)
    assert 'loss_on = "all"' not in str(raised.value)


def test_context_that_moves_stays_in_each_row(make: Make) -> None:
    """Mistral's system message and tools stand before the question that is answered, as at inference."""
    chat = conversation([{"role": "system", "content": "Be brief."}, *TWO], [{"name": "find"}])
    made = [shown(make(shapes.MISTRAL3), row) for row in make(shapes.MISTRAL3).render_rows([chat])[0]]
    tools = '[TOOL_CALLS][{"type": "function", "function": {"name": "find"}}]'
    assert made == [
        f"<s>{tools}[INST] Be brief.\n\none?[/INST]⟦ 1</s>⟧",
        f"<s>[INST] one?[/INST] 1</s>{tools}[INST] Be brief.\n\ntwo?[/INST]⟦ 2</s>⟧",
    ]


def test_context_may_lose_reasoning_and_nothing_else(make: Make) -> None:
    renderer = make(shapes.LLAMA31, loss_on="last_turn", date="2026-01-31")
    chat = [user("a"), says("Let me look.", tool_calls=CALLS), {"role": "tool", "content": 'say "x"\n'}, says("b")]
    assert template_content.CUT.format("content") in notes(renderer, chat)
    assert ends(rows(renderer, chat)) == ["b<|eot_id|>"]


def test_a_turn_of_weight_0_is_context(make: Make) -> None:
    for flag in ({"weight": 0}, {"train": False}, {"loss": False}, {"trainable": 0}, {"weight": 0.0}):
        chat = [user("a"), says("Wrong.", **flag), user("a"), says("Right.", weight=1)]
        (text,) = rows(make(shapes.PHI3), chat)
        assert "Wrong." in text
        assert ends([text]) == ["Right.<|end|>"]
    (text,) = rows(make(shapes.PHI3, loss_on="all"), chat)
    assert "⟧Wrong.<|end|>⟦" in text
    assert len(rows(make(shapes.QWEN3), chat)) == 1, "only the trained turn becomes a row"
    with pytest.raises(RowError, match="message 2 is to be left untrained, and the chat template does not show where"):
        rows(make(shapes.QWEN3, loss_on="all"), chat)


def test_weights_of_others_are_honoured_or_refused(make: Make) -> None:
    chat = [user("a") | {"weight": 1}, says("b")]
    with pytest.raises(
        RowError, match=r"message 1 \(user\) is to be trained, which loss_on = \"assistant\" does not do"
    ):
        rows(make(shapes.PHI3), chat)
    assert rows(make(shapes.PHI3, loss_on="all"), chat)
    unweighted = [user("a") | {"weight": 0}, says("b")]
    assert ends(rows(make(shapes.PHI3), unweighted)) == ["b<|end|>"]
    with pytest.raises(RowError, match=r"message 1 \(user\) is to be left untrained, which loss_on = \"all\""):
        rows(make(shapes.PHI3, loss_on="all"), unweighted)


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_turn", "all"])
@pytest.mark.parametrize("answer", ["", " \n", "<think>\n\n</think>\n\n"])
def test_an_empty_answer_is_not_trained(loss_on: str, answer: str, make: Make) -> None:
    (made,) = make(shapes.PHI3, loss_on=loss_on).render_rows([conversation([user("a"), says(answer)])])
    assert not isinstance(made, Exception)
    assert made[0].empty
    assert not made[0].trained_T.any()


def test_an_empty_turn_among_others_is_context(make: Make) -> None:
    chat = [user("a"), says(""), user("b"), says("c")]
    assert ends(rows(make(shapes.PHI3), chat)) == ["c<|end|>"]
    assert notes(make(shapes.PHI3), chat) == {chat_template.EMPTY_TURN}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (shapes.TEXT_CALLS, 'find```json\n{"city": "Oslo"}```</s>'),
        (shapes.PRINTED_CALLS, 'find{"city": "Oslo"}</s>'),
        (shapes.QWEN3, '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'),
    ],
)
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city":"Oslo"}'])
def test_arguments_are_written_as_the_template_wants(template: str, written: str, arguments: Any, make: Make) -> None:
    call = {"function": {"name": "find", "arguments": arguments}}
    made = rows(make(template), [user("where?"), says("", tool_calls=[call])])
    assert ends(made)[0].endswith(written)


def test_an_answer_that_merges_with_its_header_is_tokenised_apart(make: Make) -> None:
    renderer = make(shapes.PHI3)
    sample = conversation([user("a"), says("\n\nb")])
    (row,) = renderer.render_rows([sample])[0]
    prompt = renderer.ask(sample)[1]
    assert row.ids_T[: len(prompt)].tolist() == prompt
    assert ends([shown(renderer, row)]) == ["\n\nb<|end|>"]
    joint = renderer.tokenizer.encode("<|assistant|>\n\n\nb", add_special_tokens=False)
    assert renderer.tokenizer.encode("<|assistant|>\n", add_special_tokens=False) != joint[:2], "they merge"


def test_it_merges_by_a_space_that_offsets_leave_out(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    folder = shapes.save_tokenizer(tmp_path / "t", template)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["Ġb"] = len(stored["model"]["vocab"]) + len(stored["added_tokens"])
    stored["model"]["merges"].append(["Ġ", "b"])
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    for strip in (True, False):  # by offsets, and by lengths of tokens
        renderer = load_renderer(folder)
        if strip:
            object.__setattr__(renderer, "_byte_lengths", None)
            renderer.__dict__["_byte_lengths"] = None
        assert len(renderer.tokenizer.encode(" b", add_special_tokens=False)) == 1
        assert ends(rows(renderer, [user("a"), says("b")])) == ["b</s>"]


def test_a_stop_that_is_the_next_header_is_known(make: Make) -> None:
    renderer = make(shapes.GLM4)
    assert renderer.template.stop == "<|user|>"
    (row,) = renderer.render_rows([conversation(TWO)])[0]
    assert renderer.tokenizer.decode([row.stop_id]) == "<|user|>"
    (whole,) = make(shapes.PHI3, loss_on="all").render_rows([conversation(TWO)])[0]
    assert make(shapes.PHI3).tokenizer.decode([whole.stop_id]) == "<|end|>"


def test_a_template_that_cannot_be_told_names_no_setting_that_loses(make: Make) -> None:
    upper = (
        "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else m.content | upper) }}</s>{% endfor %}"
    )
    upper += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match=r"renders messages up to 2 differently when others follow") as raised:
        rows(make(upper), [user("a"), says("b"), user("c"), says("d")])
    assert "loss_on" not in str(raised.value)


def test_a_split_is_reported_with_its_rows(tmp_path: Path) -> None:
    """As `check` and the run's log say it."""
    from data_kit import table_of

    from distft.data.prepare import prepare

    folder = shapes.save_tokenizer(tmp_path / "t", shapes.QWEN3)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (TWO[:2], TWO, [*TWO, *TWO])))
    table = table_of(path, chat_template="auto")
    made = prepare(table, table.train, tokenizer=str(folder), cache_dir=tmp_path / "cache")
    source = made.report.sources[0]
    assert (source.num_read, source.num_kept, source.num_split) == (3, 7, 4)
    assert [made.sample_id(row) for row in range(3)] == [f"train.jsonl row {row}" for row in (1, 2, 2)]
    assert list(source.messages()) == [
        f"2 rows: {chat_template.SPLIT} (4 rows more than were read); first train.jsonl:2: 2 rows"
    ]


TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]


def test_the_header_that_a_template_always_writes_is_not_trained(make: Make) -> None:
    for loss_on, trained in (("assistant", "1<|eot_id|>|2<|eot_id|>"), ("last_turn", "2<|eot_id|>")):
        assert ends(rows(make(shapes.FIRST_LLAMA3, loss_on=loss_on), TWO)) == [trained]


def test_an_answer_follows_the_empty_block_of_reasoning_that_its_prompt_has(make: Make) -> None:
    renderer = make(shapes.NO_THOUGHT)
    made = rows(renderer, TWO)
    assert ends(made) == ["1<|im_end|>", "2<|im_end|>"]
    for index, text in zip((1, 3), made, strict=True):
        prompt, _ = renderer.ask(conversation(TWO[: index + 1]))
        assert text.startswith(prompt + "⟦")
    with pytest.raises(
        RowError, match=r'message 2 \(assistant\): its reasoning cannot be trained, .* there is none: "c'
    ):
        rows(renderer, INLINE)


def test_chats_with_tools_take_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": shapes.NO_THOUGHT}, {"name": "tool_use", "template": shapes.TOOL_USE}]
    renderer = load_renderer(shapes.save_tokenizer(tmp_path, named))
    assert ends(rows(renderer, TWO)) == ["1<|im_end|>", "2<|im_end|>"]
    made = rows(renderer, CALLING, tools=TOOLS)
    call = '<tool_call>{"name": "find", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    assert ends(made) == [call, "In the north.<|im_end|>"]
    messages = conversation(CALLING).messages
    for index, text in zip((1, 3), made, strict=True):
        asked = renderer.tokenizer.apply_chat_template(
            messages[:index], tools=TOOLS, add_generation_prompt=True, tokenize=False
        )
        assert text.startswith(asked + "⟦")


def test_what_a_template_says_behind_every_chat_is_not_trained(make: Make) -> None:
    renderer = make(shapes.LAST_INSTRUCTION)
    assert ends(rows(renderer, TWO, tools=TOOLS)) == ["1<|im_end|>", "2<|im_end|>"]
    (text,) = rows(renderer, CALLING[:2], tools=TOOLS)
    assert ends([text]) == ['{"name": "find", "arguments": {"city": "Oslo"}}\n<|im_start|>']
