"""What prepared rows are kept under: the day that a template writes, the config that decides a tokenizer's class."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import chat_templates as shapes
import pytest
from data_kit import table_of

from distft.data import fingerprint, prepare
from distft.data.render import load_renderer
from distft.data.samples import Conversation
from distft.data.store import Prepared

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    return path


def on(day: str, patch: pytest.MonkeyPatch) -> None:
    for module in (fingerprint, prepare):
        patch.setattr(module, "today", lambda: day)


def made(tokenizer: Path, rows: Path, **settings: Any) -> Prepared:
    table = table_of(rows, **{"chat_template": "auto"} | settings)
    return prepare.prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=rows.parent / "cache")


def test_a_template_is_given_one_day(tmp_path: Path) -> None:
    folder = shapes.save_tokenizer(tmp_path / "t", shapes.LLAMA31)
    for date in ("2026-01-31", "2025-12-01"):  # also where the compiled template is kept from before
        text, _ = load_renderer(folder, date=date).ask(Conversation(messages=CHAT))
        assert datetime.date.fromisoformat(date).strftime("%d %b %Y") in text
    text, _ = load_renderer(folder).ask(Conversation(messages=CHAT))
    assert datetime.date.today().strftime("%d %b %Y") in text


def test_the_day_is_part_of_the_key_where_it_is_written(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = shapes.save_tokenizer(tmp_path / "dated", shapes.LLAMA31)
    on("2026-01-31", monkeypatch)
    first = made(dated, rows)
    assert made(dated, rows).from_cache
    on("2026-02-01", monkeypatch)
    second = made(dated, rows)
    assert not second.from_cache
    assert second.fingerprint != first.fingerprint
    again = made(dated, rows, date="2026-01-31")  # a run that goes on the day after
    assert (again.from_cache, again.fingerprint) == (True, first.fingerprint)
    undated = shapes.save_tokenizer(tmp_path / "undated", shapes.PHI3)
    made(undated, rows)
    on("2026-02-02", monkeypatch)
    assert made(undated, rows).from_cache


@pytest.mark.parametrize("where", ["chat_template.jinja", "a file of the recipe's"])
def test_the_day_is_seen_wherever_the_template_is(
    where: str, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shapes.save_tokenizer(tmp_path / "t")
    path = folder / "chat_template.jinja" if where == "chat_template.jinja" else tmp_path / "own.jinja"
    path.write_text(shapes.LLAMA31)
    template = "auto" if where == "chat_template.jinja" else str(path)
    on("2026-01-31", monkeypatch)
    first = made(folder, rows, chat_template=template)
    on("2026-02-01", monkeypatch)
    assert made(folder, rows, chat_template=template).fingerprint != first.fingerprint


def test_the_config_decides_a_tokenizers_class(tmp_path: Path, rows: Path) -> None:
    """Two models with the same tokenizer files and one cache."""
    folders = [shapes.save_tokenizer(tmp_path / name, shapes.PHI3, tokenizer_class=None) for name in ("a", "b")]
    for folder, kind in zip(folders, ("llama", "qwen2"), strict=True):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    first, second = (made(folder, rows) for folder in folders)
    assert first.folder != second.folder
    assert not second.from_cache
    (folders[1] / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert made(folders[1], rows).from_cache


def test_a_template_with_a_name_of_its_own_is_part_of_the_key(tmp_path: Path, rows: Path) -> None:
    folder = shapes.save_tokenizer(tmp_path / "a")
    (folder / "chat_template.jinja").write_text(shapes.PHI3)
    first = made(folder, rows)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(shapes.TOOL_USE)
    second = made(folder, rows)
    assert first.folder != second.folder
    assert not second.from_cache
