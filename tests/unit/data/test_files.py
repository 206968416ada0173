"""Files as people have them: packed, tabbed, saved by libraries, in splits, by globs; read, or a message with a fix."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from data_kit import table_of

from distft.core.errors import DataError, RecipeError
from distft.data.prepare import prepare
from distft.data.sources import find
from distft.data.store import Prepared
from distft.recipe import load_recipe
from distft.recipe.schema import SourceTable

Prepare = Callable[..., Prepared]
ROWS = [{"text": f"The weather {number}"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "done"}]


def rows_of(path: Path | str, **table: Any) -> list[Any]:
    """Every row that the source's files hold."""
    source = find(table_of({"path": str(path), **table}).train[0])
    return [source.renamed(payload) for file in source.files for _, payload in source.rows(file)]


def tsv(rows: list[dict[str, str]]) -> bytes:
    return ("text\n" + "".join(row["text"] + "\n" for row in rows)).encode()


WRITTEN = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.csv.gz": gzip.compress(tsv(ROWS)),
    "a.tsv": tsv(ROWS),
    "a.TSV.GZ": gzip.compress(tsv(ROWS)),
    "a.ndjson": LINES,
    "a.ndjson.gz": gzip.compress(LINES),
    "list.jsonl": json.dumps(ROWS).encode(),
    "indented list.jsonl": b"\n" + json.dumps(ROWS, indent=2).encode(),
    "list in lines.jsonl": b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    "marked list.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "text.txt.gz": gzip.compress("\n\n".join(row["text"] for row in ROWS).encode()),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_file_gives_its_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITTEN[name])
    assert rows_of(tmp_path / name) == ROWS


def test_a_tabbed_file_may_quote(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'prompt\tcompletion\n"a\tb"\tc, d\n')
    assert rows_of(tmp_path / "a.tsv") == [{"prompt": "a\tb", "completion": "c, d"}]


DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], "cut.jsonl.gz: the file is damaged or cut short"),
    "not.jsonl.gz": (LINES, "not.jsonl.gz: the file is damaged or cut short"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-9], "cut.jsonl.bz2: the file is damaged or cut short"),
    "not.jsonl.xz": (LINES, "not.jsonl.xz: the file is damaged or cut short"),
    "packed.jsonl": (
        gzip.compress(LINES),
        r"packed\.jsonl: its content is that of a \.gz file, which its name does not say  rename it so that it ends",
    ),
    "table.csv": (b"PAR1\x15\x04", r"its content is that of a \.parquet file, .* rename it so that it ends with"),
    "archive.jsonl": (b"PK\x03\x04\x14", r"its content is that of a \.zip file, .*  unpack it"),
    "xz.txt": (lzma.compress(LINES), r"its content is that of a \.xz file"),
    "quotes.tsv": (
        b'prompt\tcompletion\n"Hi" he said\tb\n',
        r"quotes\.tsv:2: invalid TSV: .*  a cell that begins with a quotation mark ends with one",
    ),
    "indented.jsonl": (
        json.dumps(ROWS[0], indent=1).encode() + b"\n",
        r"indented\.jsonl:1: invalid JSON: a row is spread over several lines  write each row on a line of its own",
    ),
    "sharegpt.jsonl": (
        b'{"messages": [{"from": "human", "value": "go"}, {"from": "gpt", "value": "done"}]}\n',
        r'message 1 has "from" instead of "role": .*columns = \{ messages = "conversations" \}',
    ),
    "roles.jsonl": (
        json.dumps({"conversations": CHAT}).encode(),
        r'turn 1 has "role" instead of "from": .*columns = \{ conversations = "messages" \}',
    ),
    "a.parquet.gz": (b"x", r"files of type \.parquet inside \.gz are not read"),
    "a.zip": (b"x", r"files of type \.zip are not read  allowed: .*text also packed"),
    "pointer.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        r"pointer\.jsonl: is a Git LFS pointer, not the file itself  run git lfs pull",
    ),
    "broken.arrow": (b"x" * 64, "broken.arrow: not a readable Arrow file"),
    "semicolons.csv": (
        b"prompt;completion\na;b\n",
        r"semicolons\.csv:1: the header is one column, 'prompt;completion', separated by ';'\?  write the file with",
    ),
    "commas.tsv": (b"prompt,completion\na,b\n", r"commas\.tsv:1: the header is one column, .* separated by ','\?"),
    "chats.jsonl": (
        (json.dumps(CHAT) + "\n").encode() * 2,
        r'chats\.jsonl:1: the row is a list of messages, expected an object  write \{"messages": \[\.\.\.\]\}',
    ),
    "python.csv": (
        b'messages\n"' + str(CHAT).encode() + b'"\n',
        r"python\.csv:2: \"messages\" holds Python's notation of a list, not JSON  write it with json\.dumps",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_a_message(name: str, tmp_path: Path, prepared: Prepare) -> None:
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / name)


def test_zstd_is_read_by_whatever_package_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(LINES)
    names = ("compression.zstd", "backports.zstd", "zstandard")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    with pytest.raises(
        DataError, match=r"a\.jsonl\.zst: reading zstd needs a package .* pip install zstandard.* zstd -d"
    ):
        rows_of(path)
    stand_in = ModuleType("zstandard")
    stand_in.open = lambda path, mode: path.open(mode)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "zstandard", stand_in)
    assert rows_of(path) == ROWS


def test_pandas_index_is_no_column(tmp_path: Path, prepared: Prepare) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, index=["a", "b", "c"])
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "a.tsv", sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.reset_index(names="Unnamed: 0").to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.csv", "a.tsv", "a.parquet", "a.jsonl"):
        result = prepared(tmp_path / name)
        assert result.num_rows == 3, name
        assert result.report.sources[0].unread == {}, name


def test_messages_of_a_table_may_be_json_text(tmp_path: Path, prepared: Prepare) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"messages": [json.dumps(CHAT)] * 2}).to_csv(tmp_path / "a.csv", index=False)
    assert prepared(tmp_path / "a.csv").num_rows == 2


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("datasets")


def test_what_save_to_disk_wrote(tmp_path: Path, library: Any, prepared: Prepare) -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"a": {"x": 1}}}},
        {"function": {"name": "g"}},
    ]
    chats = [{"messages": CHAT, "tools": tools[:1]}, {"messages": CHAT, "tools": tools[1:]}]
    library.Dataset.from_list(chats).save_to_disk(tmp_path / "one", num_shards=2)
    library.DatasetDict(
        {"train": library.Dataset.from_list(ROWS), "test": library.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(tmp_path / "two")
    one = rows_of(tmp_path / "one")
    assert [row["messages"] for row in one] == [CHAT, CHAT]
    assert one[1]["tools"] == [{"function": {"name": "g"}}], "no nulls of the other row"
    assert prepared(tmp_path / "one").num_rows == 2
    assert rows_of(tmp_path / "two", split="train") == ROWS
    assert rows_of(tmp_path / "two", split="test") == ROWS[:1]
    assert rows_of(tmp_path / "two" / "test") == ROWS[:1]
    assert prepared({"path": str(tmp_path / "two"), "split": "test"}).sample_id(0).startswith("two/test/data-00000")
    for table, message in (
        ({"path": "two"}, r'two: holds several splits: train, test  write split = "train", or another'),
        ({"path": "two", "split": "tset"}, r'has no split = "tset", did you mean "test"\?  it has: train, test'),
        ({"path": "one", "split": "train"}, r'one: holds no split, not split = "train"  remove split'),
    ):
        with pytest.raises(DataError, match=message):
            rows_of(tmp_path / table.pop("path"), **table)
    (tmp_path / "two" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"a saved data set without its files: data-00000"):
        rows_of(tmp_path / "two", split="test")


CLONED = {
    "data/train-00000-of-00002-a1b2.jsonl": 0,
    "data/train-00001-of-00002-a1b2.jsonl": 1,
    "data/test-00000-of-00001-a1b2.jsonl": 2,
    "README.md": 0,
    "dataset_infos.json": 0,
    "LICENSE.txt": 0,
}
LAYOUTS: dict[str, tuple[dict[str, int], str, list[int]]] = {
    "shards": (CLONED, "train", [0, 1]),
    "named as the library names it": (CLONED, "test", [2]),
    "folders": ({"train/a.jsonl": 0, "dev/a.jsonl": 1, "extra.jsonl": 2}, "validation", [1]),
    "files": ({"train.jsonl": 0, "valid.jsonl": 1}, "train", [0]),
    "by another word": ({"train.jsonl": 0, "valid.jsonl": 1}, "dev", [1]),
    "in a name": ({"gsm8k_train.jsonl": 0, "gsm8k-test.jsonl": 1}, "test", [1]),
    "splits of its own": (
        {"data/train_sft-00000-of-00001.jsonl": 0, "data/train_gen-00000-of-00001.jsonl": 1},
        "train_gen",
        [1],
    ),
    "one split": ({"train-a.jsonl": 0, "train-b.jsonl": 1}, "train", [0, 1]),
}


def lay(folder: Path, files: dict[str, int]) -> None:
    for name, number in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(ROWS[number]) + "\n")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_of_a_folder(name: str, tmp_path: Path) -> None:
    files, split, right = LAYOUTS[name]
    lay(tmp_path / "set", files)
    assert rows_of(tmp_path / "set", split=split) == [ROWS[number] for number in right]
    if name == "one split":
        assert len(rows_of(tmp_path / "set")) == 2
        return
    with pytest.raises(DataError, match=r"set: holds several splits: .* write split = "):
        rows_of(tmp_path / "set")
    with pytest.raises(DataError, match=r'set: has no split = "nope"'):
        rows_of(tmp_path / "set", split="nope")


def test_a_folder_of_no_splits_has_none(tmp_path: Path) -> None:
    lay(tmp_path / "set", {"a.jsonl": 0, "best-of.jsonl": 1})
    assert rows_of(tmp_path / "set") == ROWS[:2]
    with pytest.raises(DataError, match=r'has no split = "train"  it has: files of no split'):
        rows_of(tmp_path / "set", split="train")


def test_a_subset_of_a_folder_is_a_folder_in_it(tmp_path: Path) -> None:
    lay(tmp_path / "set", {"en/a.jsonl": 0, "data/de/a.jsonl": 1})
    assert rows_of(tmp_path / "set", subset="en") == ROWS[:1]
    assert rows_of(tmp_path / "set", subset="de") == ROWS[1:2]
    with pytest.raises(DataError, match=r'set: has no folder for subset = "fr"  it has: data, en'):
        rows_of(tmp_path / "set", subset="fr")


CARD = """---
license: mit
dataset_info:
- config_name: main
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
tags:
- math
---
"""


def test_a_data_set_of_several_subsets_is_asked_which(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(LINES)
    assert len(rows_of(tmp_path)) == 6
    (tmp_path / "README.md").write_text(CARD)
    for table in ({}, {"split": "train"}):
        with pytest.raises(DataError, match=r'several subsets: main, socratic  write subset = "main"'):
            rows_of(tmp_path, **table)
    assert len(rows_of(tmp_path, subset="socratic")) == 3
    (tmp_path / "README.md").write_text(CARD.replace("socratic", "main"))
    assert len(rows_of(tmp_path)) == 6


def test_globs(tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"a-1.jsonl": 0, "a-2.jsonl": 1, "deep/er/a-3.jsonl": 2, "b.jsonl": 2})
    assert rows_of(tmp_path / "a-*.jsonl") == ROWS[:2]
    assert rows_of(tmp_path / "**/a-[123].jsonl") == ROWS
    assert prepared(tmp_path / "a-?.jsonl").sample_id(1) == "a-2.jsonl row 1"
    (tmp_path / "a-4.md").write_text("x")
    (tmp_path / "odd[1].jsonl").write_bytes(LINES)
    assert rows_of(tmp_path / "odd[1].jsonl") == ROWS, "a file of that very name"
    monkeypatch.chdir(tmp_path)
    for path, message in (
        (tmp_path / "a-*", r"a-4\.md: files of type \.md are not read"),
        ("c-*.jsonl", rf"c-\*\.jsonl: no file matches \(relative to {tmp_path}, the folder that the command runs in\)"),
    ):
        with pytest.raises(DataError, match=message):
            rows_of(path)


def test_a_file_is_read_once_and_not_held_out_too(tmp_path: Path, tokenizer: Path) -> None:
    """Globs and folders overlap more easily than names."""
    lay(tmp_path / "set", {"a.jsonl": 0, "valid.jsonl": 1})

    def made(*train: str, held_out: tuple[str, ...] = ()) -> Prepared:
        table = table_of(*({"path": str(tmp_path / path)} for path in train))
        sources = tuple(SourceTable(path=str(tmp_path / path)) for path in held_out)
        table = table.model_copy(update={"eval": sources})
        return prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")

    with pytest.raises(
        DataError, match=r"a\.jsonl is also a file of .*set/\*\.jsonl  remove one of the two, or set weight"
    ):
        made("set/*.jsonl", "set/a.jsonl")
    with pytest.raises(
        DataError, match=r"\[\[data\.eval\]\] .*valid\.jsonl is also trained on, by \[\[data\.train\]\] .*set/\*"
    ):
        made("set/*.jsonl", held_out=("set/valid.jsonl",))
    with pytest.raises(DataError, match=r"is also trained on, by \[\[data\.train\]\] .*set/a"):
        made("set/a.jsonl", held_out=("set/*.jsonl",))
    assert made("set/a.jsonl", held_out=("set/valid.jsonl",)).num_rows == 1


def test_split_and_subset_have_an_effect_or_are_refused(tmp_path: Path) -> None:
    lay(tmp_path, {"a.jsonl": 0})
    for path in ("a.jsonl", "*.jsonl"):
        for key in ("split", "subset"):
            with pytest.raises(DataError, match=rf'{key} = "x" has no effect on a (file|glob)  remove it'):
                rows_of(tmp_path / path, **{key: "x"})


def test_paths_say_what_they_are_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, {"rows.jsonl": 0})
    with pytest.raises(
        DataError, match=rf"rowz\.jsonl: no such file or folder \(relative to {tmp_path}.* mean rows\.jsonl"
    ):
        rows_of("rowz.jsonl")
    with pytest.raises(DataError, match="no such file or folder, did you mean"):
        rows_of(tmp_path / "rowz.jsonl")
    with pytest.raises(DataError, match=r"rows are read from files here and from the hub .* download it first"):
        rows_of("s3://bucket/rows.jsonl")


def test_a_list_of_paths_is_a_message(tmp_path: Path) -> None:
    from distft.catalog import REGISTRIES

    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[model]\npath = "m"\n[[data.train]]\npath = ["a.jsonl", "b.jsonl"]\n')
    with pytest.raises(RecipeError, match=r"line 5.*path.*is a list: write one table for each path, or a glob such as"):
        load_recipe(path, registries=REGISTRIES)
