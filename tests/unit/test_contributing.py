"""CONTRIBUTING.md names files and what is in them: both must be there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = re.findall(r"`((?:distft|tests)/[\w/]+\.py)`\s+\(`([\w.]+)`\)", TEXT)


@pytest.mark.parametrize(("file", "name"), PLACES, ids=[f"{file}-{name}" for file, name in PLACES])
def test_what_is_named_is_there(file: str, name: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for word in name.split(".") if name[0].isupper() and not name.isupper() and ".add" not in name else [name]:
        assert re.search(rf"\b{re.escape(word)}\b", text), f"{file} has no {word}"


def test_every_file_and_folder_is_there_and_the_four_questions_are_answered() -> None:
    for path in re.findall(r"`((?:distft|tests|docs)/[\w/]*(?:\.py)?)`", TEXT):
        assert (ROOT / path).exists(), path
    assert len(PLACES) > 40
    questions = ["is the loss mask made", "do ranks meet", "is a checkpoint committed", "would DPO go"]
    for question in questions:
        _, found, rest = TEXT.partition(f"**Where {question}?**")
        assert found
        assert re.search(r"`distft/[\w/]+\.py`", rest.partition("**Where")[0])
