"""Tokens found by their lengths are those that the tokenizer's own offsets give, or it is asked for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import SPECIAL, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from distft.data.boundaries import byte_lengths
from distft.data.drafts import Span
from distft.data.encoding import _chat

ASSETS = Path(os.environ.get("DISTFT_ASSETS", "/nowhere")) / "tokenizers"
PIECES = [*SPECIAL, "The weather", " in", "  ", "\n\n", "\t", "é", "é", "ﬁ", "東京", "豈", "🌞👩‍👩‍👧", "क़", ".", "0"]
texts = some.lists(some.one_of(some.sampled_from(PIECES), some.text(max_size=6)), max_size=12).map("".join)


def plain(backend: Tokenizer) -> Tokenizer:
    return backend


def normalising(backend: Tokenizer) -> Tokenizer:
    backend.normalizer = normalizers.NFC()
    return backend


def spacing(backend: Tokenizer) -> Tokenizer:
    """Writes a space of its own before each text: its tokens add up to more than the text."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def agree(backend: Tokenizer, text: str, spans: list[Span]) -> bool:
    """Whether it was told by lengths; then it must be what offsets give."""
    lengths = byte_lengths(backend)
    assert lengths is not None
    if not lengths.can_tell(text, spans):
        return False
    ids_T = np.array(backend.encode(text, add_special_tokens=False).ids, np.int64)
    found = lengths.trained(ids_T, text, spans)
    if found is None:
        return False
    right = _chat(backend.encode(text, add_special_tokens=False), text, spans)
    assert found.tolist() == right.trained_T.tolist(), (text, spans)
    return True


@pytest.mark.parametrize("change", [plain, normalising, spacing])
@given(text=texts, cuts=some.lists(some.integers(0, 200), max_size=4))
@settings(deadline=None)
def test_as_the_offsets_say(change: Any, folder: Path, text: str, cuts: list[int]) -> None:
    places = sorted(min(cut, len(text)) for cut in cuts)
    spans = list(zip(places[::2], places[1::2], strict=False))
    agree(change(Tokenizer.from_file(str(folder / "tokenizer.json"))), text, spans)


def test_most_texts_are_told_by_lengths(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<s>user\nThe weather in 東京?</s>\nassistant\nSunny 🌞</s>\n"
    begin, end = text.index("Sunny"), text.rindex("\n")
    assert agree(backend, text, [(begin, end)])
    assert agree(normalising(backend), text, [(begin, end)])
    assert not agree(backend, text, [(text.index(" in"), end)]), "offsets may leave the space out"
    assert not agree(normalising(backend), "e\u0301" + text, [(0, 3)]), "what is composed has other lengths"
    assert not agree(spacing(backend), text, [(begin, end)])


def test_one_that_never_adds_up_is_no_longer_tried(folder: Path) -> None:
    backend = spacing(Tokenizer.from_file(str(folder / "tokenizer.json")))
    lengths = byte_lengths(backend)
    assert lengths is not None
    tried = 0
    while lengths.can_tell("The weather", [(0, 2)]):
        assert lengths.trained(np.array(backend.encode("The weather").ids), "The weather", [(0, 2)]) is None
        tried += 1
    assert 0 < tried < 50


def test_other_kinds_of_tokenizers_are_asked(folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    assert byte_lengths(backend) is None
    lowering = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lowering.normalizer = normalizers.Lowercase()
    assert byte_lengths(lowering) is None


@pytest.mark.skipif(not ASSETS.is_dir(), reason="DISTFT_ASSETS names no folder")
@pytest.mark.parametrize("name", ["qwen2.5", "gpt2"])
def test_real_tokenizers(name: str) -> None:
    backend = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    lengths = byte_lengths(backend)
    assert lengths is not None
    told = []

    @given(text=texts, cuts=some.lists(some.integers(0, 200), max_size=4))
    @settings(deadline=None, max_examples=600)
    def check(text: str, cuts: list[int]) -> None:
        places = sorted(min(cut, len(text)) for cut in cuts)
        spans = list(zip(places[::2], places[1::2], strict=False))
        if lengths.can_tell(text, spans):
            encoding = backend.encode(text, add_special_tokens=False)
            found = lengths.trained(np.array(encoding.ids, np.int64), text, spans)
            told.append(found is not None)
            assert found is None or found.tolist() == _chat(encoding, text, spans).trained_T.tolist()

    check()
    assert sum(told) > 0.9 * len(told) > 100
