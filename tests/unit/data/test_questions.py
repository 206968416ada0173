"""What is asked is what was trained: the tokens before the answer; and how rows become questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_kit import save_tokenizer, table_of
from tokenizers import Tokenizer, processors

from distft.core.errors import DataError
from distft.data.questions import Columns, followed_by, questions, rows_hash, trained_as_chat
from distft.data.render import Renderer, load_renderer
from distft.data.samples import Conversation, PromptCompletion, RowError, Sample, Text

CHAT = Conversation(
    messages=[
        {"role": "system", "content": "You read stories."},
        {"role": "user", "content": "The weather in Rome?"},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
)
TURN = {"role": "user", "content": "What is 2 + 2?"}
Write = Callable[..., Path]


def asked(renderer: Renderer, *sources: Path, columns: Columns | None = None, skip_bad: bool = False, **how):
    table = table_of(*sources)
    given = {"columns": columns, "max_rows": None, "skip_bad": skip_bad, "progress": lambda rows: None} | how
    return questions(table.train, renderer, **given)


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain"])
@pytest.mark.parametrize("sample", [CHAT, PromptCompletion(prompt="What is 2 + 2?", completion=" It is 4.")])
def test_the_question_is_what_stands_before_the_trained_answer(tokenizer: Path, template: str, sample: Sample) -> None:
    renderer = load_renderer(tokenizer, chat_template=template, loss_on="last_turn")
    trained = renderer.render(sample)
    first = int(trained.trained_T.argmax())
    text, ids = renderer.ask(sample)
    assert ids == trained.ids_T[:first].tolist()
    assert "It is 4" not in text


def test_a_chat_that_ends_with_the_user_is_asked_whole(tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer, chat_template="chatml")
    assert renderer.ask(Conversation(messages=[TURN]))[0].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("adds", ["<s> $A </s>", "<s> $A"])
def test_special_tokens_that_a_tokenizer_adds(adds: str, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    own.save(str(folder / "tokenizer.json"))
    renderer = load_renderer(folder)
    _, ids = renderer.ask(PromptCompletion(prompt="The weather", completion=""))
    assert (ids[0], ids.count(1)) == (0, 0)
    before, after = renderer.pair("The weather", " in Rome")
    assert before == tuple(ids)
    assert (*before, *after) == tuple(renderer.ask(PromptCompletion(prompt="The weather in Rome", completion=""))[1])
    assert renderer.pair("", "Rome")[0] == (0,)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (Text(text="A story."), "plain text asks nothing"),
        (PromptCompletion(prompt="", completion="x"), "prompt is empty"),
    ],
)
def test_what_asks_nothing(tokenizer: Path, sample: Sample, why: str) -> None:
    with pytest.raises(RowError, match=why):
        load_renderer(tokenizer).ask(sample)


def test_white_space_between_prompt_and_choice_goes_to_the_choice(tokenizer: Path) -> None:
    """As in lm-eval's `_encode_pair`: else the boundary would be where no tokenizer cuts."""
    renderer = load_renderer(tokenizer)
    assert renderer.pair("The weather ", "in Rome") == renderer.pair("The weather", " in Rome")
    before, after = renderer.pair("The weather", " in Rome")
    assert (renderer.write(list(before)), renderer.write(list(after))) == ("The weather", " in Rome")


def test_rows_keep_their_order_names_and_references(tokenizer: Path, write: Write) -> None:
    rows = [
        {"prompt": "What is 2 + 2?", "completion": " 4", "more": [1]},
        {"prompt": [TURN], "completion": [{"role": "assistant", "content": "It is 4."}]},
    ]
    path = write("valid.jsonl", rows)
    renderer = load_renderer(tokenizer, chat_template="plain")
    first, second = asked(renderer, path)
    assert (first.id, first.reference, first.as_chat) == ("valid.jsonl row 1", " 4", False)
    assert first.row == rows[0]
    assert (second.id, second.reference, second.as_chat) == ("valid.jsonl row 2", "It is 4.", True)
    assert [one.id for one in asked(renderer, path, max_rows=1)] == ["valid.jsonl row 1"]
    assert rows_hash([first, second]) != rows_hash([second, first])
    assert rows_hash(asked(renderer, path)) == rows_hash([first, second])


def test_a_call_is_the_reference_where_the_assistant_says_nothing(tokenizer: Path, write: Write) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [TURN, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (one,) = asked(load_renderer(tokenizer, chat_template="chatml"), write([{"messages": messages}]))
    assert one.reference == '[{"name": "weather", "arguments": {"city": "Rome"}}]'


def test_columns_of_no_format(tokenizer: Path, write: Write) -> None:
    renderer = load_renderer(tokenizer, chat_template="chatml")
    path = write([{"q": "What is 2 + 2?", "gold": ["4", "four"], "choices": ["3", "4"]}])
    (raw,) = asked(renderer, path, columns=Columns(prompt="q", reference="gold", as_chat=False))
    assert (raw.prompt, raw.reference) == ("What is 2 + 2?", '["4", "four"]')
    before, after = followed_by(renderer, raw, "4")
    assert (before, renderer.write(list(after))) == (raw.ids, " 4"), "a space joins raw text"
    (chat,) = asked(renderer, path, columns=Columns(prompt="q", reference=None, as_chat=True))
    assert chat.reference == ""
    before, after = followed_by(renderer, chat, "4")
    assert (before, renderer.write(list(after))) == (chat.ids, "4")


def test_mistakes_name_file_and_row(tokenizer: Path, write: Write) -> None:
    renderer = load_renderer(tokenizer)
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a"}
    path = write("v.jsonl", [good, bad])
    with pytest.raises(DataError, match=r'v.jsonl:2: missing "completion"'):
        asked(renderer, path)
    assert len(asked(renderer, path, skip_bad=True)) == 1
    with pytest.raises(DataError, match=r'v.jsonl:1: missing "gold"'):
        asked(renderer, path, columns=Columns(prompt="prompt", reference="gold", as_chat=False))
    with pytest.raises(DataError, match="no row that asks anything"):
        asked(renderer, write("w.jsonl", [{"prompt": "", "completion": "x"}]), skip_bad=True)


def test_whether_chats_are_trained(write: Write) -> None:
    chats = write("c.jsonl", [{"messages": [TURN, {"role": "assistant", "content": "4"}]}])
    raw = write("r.jsonl", [{"prompt": "a", "completion": "b"}])
    assert trained_as_chat(table_of(chats, raw).train)
    assert not trained_as_chat(table_of(raw, chats).train)
