"""Raw text: special tokens once, end-of-sequence always, and the prompt boundary as TRL draws it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_kit import save_tokenizer
from tokenizers import Tokenizer, processors

from distft.core.errors import DataError
from distft.data.render import load_renderer
from distft.data.samples import PromptCompletion, RowError, Text

BOS, EOS = 0, 1


def adding(folder: Path, template: str) -> Path:
    """The same tokenizer, made to add special tokens by itself."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.row(34)
def test_text_ends_with_eos_and_is_trained_whole(tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer)
    rendered = renderer.render(Text(text="The weather"))
    assert rendered.ids_T.tolist() == [*renderer.tokenizer("The weather")["input_ids"], EOS]
    assert rendered.trained_T.all()


def test_eos_already_there_is_not_doubled(tokenizer: Path) -> None:
    assert load_renderer(tokenizer).render(Text(text="Rome</s>")).ids_T.tolist().count(EOS) == 1


@pytest.mark.row(34)
def test_eos_is_trained_when_it_is_also_the_padding(tmp_path: Path) -> None:
    renderer = load_renderer(save_tokenizer(tmp_path / "t", pad_token="</s>"), chat_template="plain")
    for sample in (Text(text="Rome"), PromptCompletion(prompt="Rome", completion=" is")):
        rendered = renderer.render(sample)
        assert (rendered.ids_T[-1], rendered.trained_T[-1]) == (EOS, True)


@pytest.mark.parametrize(("adds", "starts"), [("<s> $A", 1), ("$A", 0), ("<s> $A </s>", 1)])
def test_the_tokenizers_own_special_tokens_come_once(adds: str, starts: int, tmp_path: Path) -> None:
    renderer = load_renderer(adding(save_tokenizer(tmp_path / "t"), adds))
    for sample in (Text(text="Rome"), PromptCompletion(prompt="Rome", completion=" is")):
        rendered = renderer.render(sample)
        ids = rendered.ids_T.tolist()
        assert (ids.count(BOS), ids.count(EOS), ids[-1]) == (starts, 1, EOS)
    prompt_ids = renderer.tokenizer("Rome", add_special_tokens=False)["input_ids"]
    assert rendered.trained_T.tolist().index(True) == len(prompt_ids) + starts
    assert not rendered.diverged


def test_llama3_writes_bos_once_though_the_tokenizer_adds_it_too(tmp_path: Path) -> None:
    from distft.data.chat import conversation

    chat = conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    renderer = load_renderer(adding(save_tokenizer(tmp_path / "t"), "<s> $A"), chat_template="llama3")
    assert renderer.render(chat).ids_T.tolist().count(BOS) == 1


def trl_rendering(tokenizer: object, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """What TRL 1.16's SFTTrainer makes of a prompt/completion row: ids and completion mask."""
    if not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + completion)["input_ids"]
    shared = 0
    while shared < min(len(prompt_ids), len(ids)) and prompt_ids[shared] == ids[shared]:
        shared += 1
    return ids, [0] * shared + [1] * (len(ids) - shared)


@pytest.mark.parametrize(
    ("prompt", "completion", "diverged"),
    [
        ("What is 2 + 2?", " It is 4.", False),
        ("What is 2 + 2? It ", "is 4.", True),
        ("Once up", "on a time", True),
        ("", "The weather", False),
        ("The weather", "", False),
        ("Rome 🌞", "🌞 sunny</s>", False),
    ],
)
def test_prompt_completion_is_trls_rendering(prompt: str, completion: str, diverged: bool, tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer)
    rendered = renderer.render(PromptCompletion(prompt=prompt, completion=completion))
    assert (rendered.ids_T.tolist(), rendered.trained_T.tolist()) == trl_rendering(
        renderer.tokenizer, prompt, completion
    )
    assert rendered.diverged == diverged


def test_all_trains_the_prompt_too(tokenizer: Path) -> None:
    rendered = load_renderer(tokenizer, loss_on="all").render(PromptCompletion(prompt="Rome", completion=" is"))
    assert rendered.trained_T.all()


def test_many_equal_one_by_one(tokenizer: Path) -> None:
    renderer = load_renderer(tokenizer)
    samples = [Text(text="Rome"), PromptCompletion(prompt="a", completion="b"), Text(text="\ud800"), Text(text="is")]
    many = renderer.render_many(samples)
    assert isinstance(many[2], RowError)
    assert "lone surrogate \\ud800" in str(many[2])
    for at in (0, 1, 3):
        assert many[at].ids_T.tolist() == renderer.render(samples[at]).ids_T.tolist()


@pytest.mark.row(34)
def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no end-of-sequence token.*"eos_token" in tokenizer_config\.json'):
        load_renderer(save_tokenizer(tmp_path / "t", eos_token=None))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_renderer(tmp_path)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_renderer(folder)


@pytest.mark.row(39)
def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    folder = save_tokenizer(tmp_path / "t", **own)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'crater')!r})\nclass OwnTokenizer: pass\n")
    with pytest.raises(DataError, match=r"cannot be loaded: .*trust_remote_code|contains custom code"):
        load_renderer(folder)
    assert not (tmp_path / "crater").exists()


def test_truncation_stored_in_the_tokenizer_is_ignored(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(load_renderer(folder).render(Text(text="Once upon a time")).ids_T) > 4
