"""`distft check` as a user sees it: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distft.check import SampleView, highlighted, main

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]
RECIPE = """\
name = "try"
[model]
path = "{model}"
init = "random"
[data]
max_length = 128
chat_template = "plain"
bad_rows = "skip"
cache_dir = "{cache}"
[[data.train]]
path = "{train}"
[[data.eval]]
path = "{valid}"
format = "text"
[train]
epochs = 2
global_batch_size = 2
micro_batch_size = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a tokenizer, seven training rows (one bad, one too long) and two held-out ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["What is it?"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
    long = [CHAT[0], {"role": "assistant", "content": "\x01" * 200}]
    train = [*[{"messages": CHAT}] * 5, {"messages": []}, {"messages": long}]
    for name, rows in (("train", train), ("valid", [{"text": "Rome"}, {"text": "Paris"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "try.toml"
    names = {name: (tmp_path / f"{name}.jsonl").as_posix() for name in ("train", "valid")}
    path.write_text(RECIPE.format(model=tmp_path.as_posix(), cache=(tmp_path / "cache").as_posix(), **names))
    return path


def test_says_what_the_data_becomes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert 'loss_on = "assistant"' in said  # a default, filled in
    assert "messages (auto)" in said
    assert "dropped: 1 too long, 1 bad row; longest row" in said
    assert "train.jsonl:6: the list of messages is empty" in said
    assert "User:\nWhat is 2 + 2?\n\nAssistant:\n⟦It is 4.</s>⟧" in said
    assert "⟦Rome</s>⟧" in said
    assert "█" in said
    assert re.search(r"^  steps +\d+  \(\d+ sequences\)$", said, re.MULTILINE)


def test_json_says_the_same(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--json", "--samples", "0", "--set", "data.packing=false"]) == 0
    said = json.loads(capsys.readouterr().out)
    train, valid = said["splits"]
    assert (train["num_rows"], train["num_sequences"], said["num_steps"], said["num_samples"]) == (5, 5, 5, 10)
    assert train["sources"][0]["dropped"] == {"bad row": 1, "too long": 1}
    assert said["tokens_per_epoch"] == train["num_tokens"] == sum(source["num_tokens"] for source in train["sources"])
    assert sum(count for *_, count in train["lengths"]) == 5
    assert (valid["num_rows"], valid["samples"]) == (2, [])
    assert said["recipe"]["data"]["packing"] is False


def test_what_rows_lose_or_hold_is_told_with_an_example(recipe: Path, tmp_path: Path, capsys) -> None:
    odd = [
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1]], "id": 1},
        {"messages": [CHAT[0], CHAT[1] | {"content": "Write </s> to stop."}], "id": 2},
        {"messages": [CHAT[0], CHAT[1] | {"content": " "}]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    assert main([str(recipe), "--samples", "0"]) == 0
    said = capsys.readouterr().out
    assert "dropped: 1 empty; longest row" in said
    assert "1 rows: turns left untrained: weight 0 or train = false; first train.jsonl:1: message 2" in said
    assert "1 rows: special tokens typed inside a message, kept as text; first train.jsonl:2: message 2: </s>" in said
    assert 'columns not read: "id" (2)' in said
    assert main([str(recipe), "--samples", "0", "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["splits"][0]["sources"]
    assert source["unread"] == {"id": 2}
    assert [note["num_rows"] for note in source["notes"].values()] == [1, 1]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [CHAT[0], CHAT[1] | {"reasoning": "add"}]}) + "\n")
    assert main([str(recipe)]) == 3
    assert 'train.jsonl:1: chat_template "plain": does not render reasoning_content' in capsys.readouterr().err


def test_care_is_told_and_kept(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "card.md"
    assert main([str(recipe), "--samples", "0", "--card", str(page)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"repeats +4 equal, 0 nearly, of 6 training rows", said)
    assert "train.jsonl row 2 is train.jsonl row 1" in said
    assert re.search(r"overlap +0 of 2 evaluation rows are also trained on", said)
    assert "! 6 training rows: below 100" in said
    assert "# Data card: try" in page.read_text()
    assert main([str(recipe), "--samples", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["care"]["num_same"] == 4
    assert main([str(recipe), "--samples", "0", "--card", str(tmp_path / "none" / "card.md")]) == 8
    assert "the data card cannot be written" in capsys.readouterr().err


def test_rows_that_evaluation_shares_are_refused_on_demand(recipe: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "valid.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    changes = ["--samples", "0", "--set", "data.eval.0.format=messages"]
    assert main([str(recipe), *changes]) == 0
    assert "1 of 1 evaluation rows are also trained on" in capsys.readouterr().out
    assert main([str(recipe), *changes, "--set", "data.overlap=error"]) == 3
    said = capsys.readouterr()
    assert "1 of 1 evaluation rows are also trained on" in said.err
    assert "valid.jsonl row 1 is train.jsonl row 1" in said.err
    assert not said.out


@pytest.mark.row(25)
@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["data.packing=3"], 2, "packing"),
        (["data.max_length=8"], 3, "none of its 7 rows can be trained: 6 too long, 1 bad row"),
        (["train.global_batch_size=64"], 3, "fewer than [train] global_batch_size = 64"),
        (["data.bad_rows=error"], 3, "train.jsonl:6: the list of messages is empty"),
    ],
)
def test_a_mistake_is_a_message_and_a_code(
    changes: list[str], code: int, message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(recipe), *(word for change in changes for word in ("--set", change))]
    assert main(arguments) == code
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out


def test_trained_text_is_green_in_a_terminal() -> None:
    sample = SampleView(id="x", num_tokens=2, num_supervised=1, pieces=(("ask [b]", False), ("answer", True)))
    console = Console(file=StringIO(), force_terminal=True, color_system="standard")
    console.print(highlighted(sample, colour=True))
    assert "\x1b[30;42manswer" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert highlighted(sample, colour=False).plain == "ask [b]⟦answer⟧"


def test_torch_is_not_imported() -> None:
    subprocess.run([sys.executable, "-c", "import sys, distft.check; assert 'torch' not in sys.modules"], check=True)
