"""Preparation: cached, safe when many start together or one dies, the same bytes however it is made, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import save_tokenizer, table_of, texts

from distft.core.errors import DataError, FileSystemError
from distft.data import fingerprint, rows
from distft.data.prepare import prepare
from distft.data.prepared_folder import cache_folder
from distft.data.render import load_renderer
from distft.data.rows import RowMaker
from distft.data.samples import PromptCompletion
from distft.data.store import Prepared

PairRows = list[dict[str, str]]


def pairs(number: int) -> PairRows:
    return [{"prompt": f"What is {n} + {n}?", "completion": f" It is {2 * n}."} for n in range(number)]


def test_rows_are_where_they_say(write: Callable[..., Path], prepared: Callable[..., Prepared]) -> None:
    first, second = write("a.jsonl", texts([3, 40, 5])), write("b.jsonl", texts([7, 9]))
    result = prepared(first, second, max_length=16)
    assert result.num_rows == 4
    assert [result.sample_id(row) for row in range(4)] == [
        "a.jsonl row 1",
        "a.jsonl row 3",
        "b.jsonl row 1",
        "b.jsonl row 2",
    ]
    assert result.lengths.tolist() == [3, 5, 7, 9]
    assert result.supervised.tolist() == [2, 4, 6, 8]
    assert [part.tolist() for part in result.source_rows()] == [[0, 1], [2, 3]]
    ids, trained = result.row(1)
    assert (len(set(ids[:-1].tolist())), ids[-1], trained.tolist()) == (1, 1, [1] * 5)
    assert (result.lengths.dtype, ids.dtype, trained.dtype) == (np.int32, np.int32, np.uint8)


def test_files_of_one_name_are_told_apart(
    tmp_path: Path, write: Callable[..., Path], prepared: Callable[..., Prepared]
) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    paths = [write(f"{folder}/train.jsonl", texts([4])) for folder in ("x", "y")]
    result = prepared(*paths)
    assert [result.sample_id(row) for row in (0, 1)] == [f"{path} row 1" for path in paths]


@pytest.mark.row(27, 28)
@pytest.mark.parametrize(
    ("policy", "kept", "dropped", "cut"),
    [
        ("drop", [4, 16], {"too long": 2}, 0),
        ("truncate", [4, 16, 16], {"no trained token left after truncation": 1}, 1),
    ],
)
def test_long_rows(
    policy: str,
    kept: list[int],
    dropped: dict[str, int],
    cut: int,
    write: Callable[..., Path],
    prepared: Callable[..., Prepared],
) -> None:
    rows_ = [{"prompt": "", "completion": row["text"]} for row in texts([4, 16, 17])]
    rows_.append({"prompt": "\x01" * 30, "completion": "x"})
    result = prepared(write(rows_), max_length=16, long_rows=policy)
    source = result.report.sources[0]
    assert result.lengths.tolist() == kept
    assert (source.dropped, source.num_truncated, source.longest) == (dropped, cut, 32)
    assert source.num_read == source.num_kept + source.num_dropped


@pytest.mark.row(27)
def test_the_report_counts_everything(write: Callable[..., Path], prepared: Callable[..., Prepared]) -> None:
    rows_ = [
        {"prompt": "Once up", "completion": "on a time"},
        *pairs(2),
        {"prompt": "x", "completion": ""},
        {"prompt": 1},
    ]
    rows_.append({"prompt": "", "completion": "</s>"})  # one token: trained, but nothing comes before it
    result = prepared(write(rows_), bad_rows="skip")
    source = result.report.sources[0]
    assert (source.format, source.decided, source.num_read, source.num_kept) == ("prompt_completion", True, 6, 3)
    assert source.dropped == {"empty": 1, "bad row": 1, "no trained token": 1}
    assert source.num_diverged == 1
    assert source.num_tokens == result.lengths.sum()
    assert source.num_supervised == result.supervised.sum()
    assert source.lengths["max"] == result.lengths.max()
    assert source.reasons() == "1 no trained token, 1 bad row, 1 empty"


def test_the_second_call_reads_nothing_but_the_cache(
    write: Callable[..., Path], prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(pairs(300))
    first = prepared(path)

    def forbidden(*given: object, **named: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(rows, "load_renderer", forbidden)
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", forbidden)
    start = time.monotonic()
    second = prepared(path)
    assert time.monotonic() - start < 0.5
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report


def test_whatever_changes_a_token_prepares_anew(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}")
    tokenizer = save_tokenizer(tmp_path / "t")

    def made(**settings: Any) -> bool:
        table = table_of({"path": str(path), **settings.pop("source", {})}, **settings)
        return not prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache").from_cache

    assert made()
    assert not made()
    assert not made(packing=False, shuffle=False, source={"weight": 3.0})  # matters later, not to tokens
    assert made(max_length=64)
    assert made(loss_on="all")
    assert made(source={"max_rows": 2})
    assert made(chat_template="plain")
    assert made(chat_template=str(template), loss_on="all")
    template.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert made(chat_template=str(template), loss_on="all")
    path.write_text(path.read_text() + "\n")
    assert made()
    save_tokenizer(tokenizer, pad_token="<s>")
    assert made()


def test_worker_processes_make_the_same_bytes(write: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    path = write(pairs(1300))
    made = []
    for number, workers in enumerate((0, 2)):
        table = table_of(path, num_workers=workers)
        result = prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / f"cache{number}")
        assert not result.from_cache
        made.append({file.name: file.read_bytes() for file in sorted(result.folder.iterdir())})
    assert made[0] == made[1]
    renderer = load_renderer(tokenizer)
    for row in (0, 511, 512, 1299):  # on both sides of where pieces meet
        alone = renderer.render(PromptCompletion(**pairs(1300)[row]))
        ids, trained = result.row(row)
        assert (ids.tolist(), trained.tolist()) == (alone.ids_T.tolist(), alone.trained_T.tolist())


@pytest.mark.slow
def test_a_workers_error_is_the_same_error(
    write: Callable[..., Path], prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    rows_: list[Any] = [*pairs(600), {"prompt": "x"}]
    with pytest.raises(DataError, match=r'^train\.jsonl:601: missing "completion"|"prompt" is a string') as raised:
        prepared(write(rows_), num_workers=1)
    assert raised.value.exit_code == 3
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir() and entry.name != "hashes"]


SCRIPT = """
import sys, time
from pathlib import Path
from distft.data import rows
from distft.data.prepare import prepare
from distft.recipe.schema import DataTable, TrainSourceTable

tokenizer, data, cache, mode = sys.argv[1:]
if mode == "hang":
    def make(*given):
        print("working", flush=True)
        time.sleep(60)
    rows.RowMaker.make = make
table = DataTable(train=(TrainSourceTable(path=data),))
result = prepare(table, table.train, tokenizer=tokenizer, cache_dir=Path(cache))
print(result.from_cache, result.fingerprint, "transformers" in sys.modules)
"""


def start(tokenizer: Path, data: Path, cache: Path, mode: str = "work") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(tokenizer), str(data), str(cache), mode]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.row(29)
def test_of_four_that_start_together_one_works(write: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    path = write(pairs(200))
    started = [start(tokenizer, path, tmp_path / "cache") for _ in range(4)]
    said = [process.communicate(timeout=120)[0].split() for process in started]
    assert sorted(from_cache for from_cache, _, _ in said) == ["False", "True", "True", "True"]
    assert len({found for _, found, _ in said}) == 1
    assert {(cached, loaded) for cached, _, loaded in said} == {("False", "True"), ("True", "False")}


@pytest.mark.row(29)
@pytest.mark.slow
def test_each_node_with_a_cache_of_its_own_prepares_once(
    write: Callable[..., Path], tokenizer: Path, tmp_path: Path
) -> None:
    path = write(pairs(200))
    started = [(node, start(tokenizer, path, tmp_path / node)) for node in ("node1", "node2") for _ in range(2)]
    said = [(node, *process.communicate(timeout=120)[0].split()) for node, process in started]
    assert sorted((node, cached) for node, cached, *_ in said) == [
        (node, cached) for node in ("node1", "node2") for cached in ("False", "True")
    ]
    assert len({found for *_, found, _ in said}) == 1, "the same rows on both"


@pytest.mark.row(29)
def test_killed_midway_leaves_nothing_and_holds_nothing(
    write: Callable[..., Path], tokenizer: Path, tmp_path: Path
) -> None:
    path, cache = write(pairs(50)), tmp_path / "cache"
    process = start(tokenizer, path, cache, "hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert [entry.name for entry in cache.glob(".tmp-*")]
    table = table_of(path)
    result = prepare(
        table.model_copy(update={"chat_template": "auto", "num_workers": "auto"}),
        table.train,
        tokenizer=str(tokenizer),
        cache_dir=cache,
    )
    assert not result.from_cache
    assert not list(cache.glob(".tmp-*"))


@pytest.mark.row(29)
def test_who_waited_for_a_failure_fails_without_trying(
    write: Callable[..., Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(pairs(5))
    tried: list[int] = []

    def make(*given: object) -> None:
        tried.append(1)
        time.sleep(1.0)
        raise DataError("row 3 is bad")

    monkeypatch.setattr(RowMaker, "make", make)
    failed: list[str] = []

    def run() -> None:
        table = table_of(path)
        with pytest.raises(DataError) as raised:
            prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")
        failed.append(str(raised.value))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert failed == ["row 3 is bad"] * 3
    assert len(tried) == 1
    monkeypatch.undo()
    table = table_of(path)
    assert prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "cache").num_rows == 5


def test_a_cache_that_cannot_be_written(write: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = table_of(write(pairs(1)))
    with pytest.raises(FileSystemError, match=r"prepared rows cannot be written: .*  set \[data\] cache_dir"):
        prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path / "file" / "cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path))
    assert cache_folder(table_of(Path("x"))) == tmp_path / "data"
    assert cache_folder(table_of(Path("x"), cache_dir="rows")) == Path("rows")


def test_a_cache_on_the_nodes_own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    table = table_of(tmp_path / "x.jsonl", cache_dir="$SLURM_TMPDIR/rows")
    assert cache_folder(table) == tmp_path / "rows"
    monkeypatch.delenv("SLURM_TMPDIR")
    with pytest.raises(DataError, match=r'cache_dir = "\$SLURM_TMPDIR/rows": \$SLURM_TMPDIR is not set on '):
        cache_folder(table)


def test_progress_is_told(write: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    table, told = table_of(write(pairs(600))), []
    prepare(table, table.train, tokenizer=str(tokenizer), cache_dir=tmp_path, progress=told.append)
    assert told == [512, 600]


MEMORY_SCRIPT = """
import json, resource, sys
from pathlib import Path
from distft.data.prepare import prepare
from distft.recipe.schema import DataTable, TrainSourceTable

if __name__ == "__main__":
    tokenizer, folder = sys.argv[1], Path(sys.argv[2])
    peaks = []
    for number in (10_000, 100_000):
        path = folder / f"{number}.jsonl"
        with path.open("w") as file:
            for n in range(number):
                file.write(json.dumps({"text": f"{n} Once upon a time there was a small tokenizer. " * 8}) + "\\n")
        table = DataTable(train=(TrainSourceTable(path=str(path)),), num_workers=0)
        assert prepare(table, table.train, tokenizer=tokenizer, cache_dir=folder / "cache").num_rows == number
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    print(*peaks)
"""


@pytest.mark.slow
def test_ten_times_the_rows_take_no_more_memory(tokenizer: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tokenizer), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=True)
    small_mib, large_mib = map(int, said.stdout.split())
    assert large_mib - small_mib < 64


WORKERS_SCRIPT = """
import multiprocessing, sys
from pathlib import Path
from distft.data.prepare import prepare
from distft.recipe.schema import DataTable, TrainSourceTable

def tell(rows):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

table = DataTable(train=(TrainSourceTable(path=sys.argv[2]),), num_workers=1)
prepare(table, table.train, tokenizer=sys.argv[1], cache_dir=Path(sys.argv[3]), progress=tell)
"""


def test_workers_die_with_a_killed_parent(write: Callable[..., Path], tokenizer: Path, tmp_path: Path) -> None:
    path = write(pairs(60_000))
    command = [sys.executable, "-c", WORKERS_SCRIPT, str(tokenizer), str(path), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in workers if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not alive


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
