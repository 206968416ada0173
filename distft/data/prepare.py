"""Rows -> tokens on disk, once: parallel over processes, in bounded memory, cached, safe when many start together.

Runs before any process group exists, so a slow preparation cannot run into a collective's timeout.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from distft.core.errors import DataError, FileSystemError
from distft.core.file_lock import locked_once
from distft.core.tokenizer_files import MORE_TEMPLATES, TOKENIZER_FILES, tokenizer_folder
from distft.data.fingerprint import cache_key, today
from distft.data.preparation_report import SHOWN_FAULTS, PrepareReport, SourceReport
from distft.data.readers import Payload
from distft.data.rows import Made, RowMaker, group_size_of
from distft.data.samples import FormatSpec
from distft.data.sources import RowSource, decide_format, find
from distft.data.store import Prepared, Writer

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable, SourceTable

Progress: TypeAlias = Callable[[int], None]
"""Told the number of rows read so far."""

_TASK_ROWS = 512
_TASK_BYTES = 4 << 20
_PARALLEL_FROM_TASKS = 32
"""`num_workers = "auto"` starts processes from here on: a worker needs seconds to import its libraries, and the
tokenizer's own threads keep the cores busy meanwhile."""
_FEW_CORES = 4
"""With fewer cores, the tokenizer's threads alone are as fast."""
_MAX_AUTO_WORKERS = 32


@dataclass(frozen=True, kw_only=True)
class Task:
    """Some rows of one file, small enough to be sent to another process."""

    source: int
    file: int
    """Index over all files of all sources."""
    label: str
    rows: list[tuple[int, Payload]]


def prepare(
    table: DataTable,
    sources: Sequence[SourceTable],
    *,
    tokenizer: str,
    revision: str | None = None,
    split: Literal["train", "eval"] = "train",
    cache_dir: Path,
    virtual_tokens: int = 0,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
) -> Prepared:
    """Return the rows of `sources` as tokens: from the cache if they were prepared before, else prepared now.

    Of several processes that ask together, on one machine or on a shared file system, one works and the others wait.
    Nothing half-made is ever seen: the finished folder appears by one rename, and the lock dies with its holder.

    Args:
        table: the settings; its own lists of sources are not looked at.
        sources: tables of one split.
        tokenizer: folder or hub id.
        revision: pins a hub id.
        split: names the recipe's list in messages.
        cache_dir: where prepared rows live, see `cache_folder`.
        virtual_tokens: of the method, before every document.
        progress: called while working.
        waiting: called once a second while another process works.

    Raises:
        DataError: a source cannot be read, a row is bad (`bad_rows = "error"`), or a source keeps no row at all.
        FileSystemError: `cache_dir` cannot be written.
    """
    table = table if table.date else table.model_copy(update={"date": today()})  # one day, however long it takes
    row_sources = with_distinct_labels([find(source, merge_turns=table.merge_turns) for source in sources])
    _refuse_twice(row_sources, table.eval if split == "train" else (), split)
    specs = [decide_format(source) for source in row_sources]
    folder = tokenizer_folder(tokenizer, revision)
    names = (*TOKENIZER_FILES, "config.json")  # whose model_type decides the tokenizer's class
    tokenizer_files = [path for name in names if (path := folder / name).is_file()]
    tokenizer_files += sorted(folder.glob(MORE_TEMPLATES))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        heard = (progress or (lambda rows: None), waiting or (lambda: None))
        key = cache_key(
            table, row_sources, specs, tokenizer_files, cache_dir / "hashes", heard[1], virtual_tokens=virtual_tokens
        )[:40]
        target = cache_dir / key
        if target.is_dir():
            return Prepared(target)
        job = _Job(table, row_sources, specs, str(folder), f"[[data.{split}]]", virtual_tokens, *heard)
        return Prepared(target, from_cache=not _build_once(job, target))
    except OSError as error:
        raise FileSystemError(
            f"{cache_dir}: prepared rows cannot be written: {error.strerror or error}  "
            "set [data] cache_dir to a folder that can be, with room"
        ) from None


def _refuse_twice(row_sources: Sequence[RowSource], held_out: Sequence[SourceTable], split: str) -> None:
    """Refuse files that two sources name, as globs and folders may.

    Raises:
        DataError: a file is read twice, or is trained on and held out.
    """
    seen: dict[Path, str] = {}
    for source in row_sources:
        for file in source.files:
            if file.path is None:
                continue
            before = seen.setdefault(file.path.resolve(), source.table.path)
            if before is not source.table.path:
                raise DataError(
                    f"[[data.{split}]] {source.table.path}: {file.path} is also a file of {before}  remove one of the "
                    "two, or set weight to repeat rows"
                )
    for source in map(find, held_out):
        for file in source.files:
            if file.path is not None and (trained := seen.get(file.path.resolve())) is not None:
                raise DataError(
                    f"[[data.eval]] {source.table.path}: {file.path} is also trained on, by [[data.train]] {trained}  "
                    "evaluate on rows that are not trained"
                )


@dataclass(frozen=True)
class _Job:
    """What is to be prepared."""

    table: DataTable
    sources: list[RowSource]
    specs: list[FormatSpec]
    """The format of each source."""
    tokenizer: str
    where: str
    """The recipe's list of these sources, for messages."""
    virtual_tokens: int
    progress: Progress
    waiting: Callable[[], None]
    """Called every second while another process prepares these rows."""


def _build_once(job: _Job, target: Path) -> bool:
    """Make `target` unless another process does meanwhile; whether this one did.

    Raises:
        DataError: from building, also when it was another process that failed while this one waited.
    """
    failure = target.with_suffix(".failed")
    failed_before = _identity(failure)

    def done() -> bool:
        return target.is_dir() or _identity(failure) != failed_before

    with locked_once(target.with_suffix(".lock"), job.waiting, done=done) as ours:
        if target.is_dir():
            return False
        if not ours:
            raise DataError(json.loads(failure.read_text(encoding="utf-8")))
        for stale in target.parent.glob(f".tmp-{target.name}-*"):  # its maker held the lock, so it is dead
            shutil.rmtree(stale, ignore_errors=True)
        aside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
        try:
            _build(job, aside, target)
        except DataError as error:
            failure.write_text(json.dumps(str(error)), encoding="utf-8")
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        failure.unlink(missing_ok=True)
        return True


def _build(job: _Job, aside: Path, target: Path) -> None:
    converts, reads = [spec.convert for spec in job.specs], [spec.reads for spec in job.specs]
    maker = RowMaker(job.table, job.sources, converts, job.tokenizer, reads, job.virtual_tokens)
    reports = [
        SourceReport(path=source.table.path, format=spec.name, decided=source.table.format == "auto")
        for source, spec in zip(job.sources, job.specs, strict=True)
    ]
    group_size = group_size_of(job.sources, job.specs, job.table, job.where)
    values = job.specs[0].values
    writer = Writer(aside, group_size=group_size, num_values=len(values))
    try:
        for task, made in _made(maker, _tasks(job.sources, reports)):
            _count(reports[task.source], made)
            writer.append(made.rows, file=task.file)
            job.progress(sum(report.num_read for report in reports))
        for report in reports:
            _refuse_nothing(report, job.table, job.where)
        _add_percentiles(writer, reports)
        report = PrepareReport(
            sources=tuple(reports),
            files=tuple(file.label for source in job.sources for file in source.files),
            file_sources=tuple(index for index, source in enumerate(job.sources) for _ in source.files),
            fingerprint=writer.fingerprint(),
            largest_id=writer.largest_id,
            stop_ids=writer.stop_ids(),
            group_size=group_size,
            values=values,
        )
        writer.commit(report, target)
    finally:
        writer.close()


def _tasks(sources: list[RowSource], reports: list[SourceReport]) -> Iterator[Task]:
    file_index = 0
    for index, source in enumerate(sources):
        limit = source.table.max_rows
        for file in source.files:
            left = None if limit is None else limit - reports[index].num_read
            rows: list[tuple[int, Payload]] = []
            size = 0
            for number, payload in islice(source.rows(file), left):
                reports[index].num_read += 1
                rows.append((number, payload))
                size += _size(payload)
                if len(rows) == _TASK_ROWS or size > _TASK_BYTES:
                    yield Task(source=index, file=file_index, label=file.label, rows=rows)
                    rows, size = [], 0
            if rows:
                yield Task(source=index, file=file_index, label=file.label, rows=rows)
            file_index += 1


def _size(value: object) -> int:
    """Return roughly the bytes of a payload."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _made(maker: RowMaker, tasks: Iterator[Task]) -> Iterator[tuple[Task, Made]]:
    """Yield what becomes of each task, in order; made here or by worker processes."""
    workers = maker.table.num_workers
    if workers == "auto":
        first = list(islice(tasks, _PARALLEL_FROM_TASKS))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, _MAX_AUTO_WORKERS) if cores >= _FEW_CORES and len(first) == _PARALLEL_FROM_TASKS else 0
        tasks = chain(first, tasks)
    if workers and _can_travel(maker):
        yield from _made_by_workers(workers, maker, tasks)
    else:
        yield from ((task, maker.make(task.source, task.label, task.rows)) for task in tasks)


def _can_travel(maker: RowMaker) -> bool:
    """Return whether another process can be given the formats: one defined in a script or a test cannot be."""
    try:
        pickle.dumps(maker)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


_worker: RowMaker | None = None


def _start_worker(maker: RowMaker) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    _worker = maker


def _end_with_parent() -> None:
    """End a pool's worker with its parent, which holds the other end of the queue it waits on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: Task) -> Made:
    assert _worker is not None
    return _worker.make(task.source, task.label, task.rows)


def _made_by_workers(workers: int, maker: RowMaker, tasks: Iterable[Task]) -> Iterator[tuple[Task, Made]]:
    """Keep two tasks per worker under way, so memory stays bounded however slow the disk is."""
    # spawn: a fork would copy the tokenizer's and torch's threads in an unknown state
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(maker,)
    )
    under_way: deque[tuple[Task, Future[Made]]] = deque()
    try:
        for task in tasks:
            under_way.append((replace(task, rows=[]), pool.submit(_work, task)))
            if len(under_way) >= 2 * workers:
                done, future = under_way.popleft()
                yield done, future.result()
        for done, future in under_way:
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that prepares data died, most likely out of memory  set [data] num_workers lower; "
            'a script that calls distft needs an `if __name__ == "__main__":` guard'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _count(report: SourceReport, made: Made) -> None:
    report.num_kept += len(made.rows.lengths_N)
    report.num_tokens += int(made.rows.lengths_N.sum())
    report.num_supervised += int(made.rows.supervised_N.sum())
    report.num_truncated += made.num_truncated
    report.num_diverged += made.num_diverged
    report.longest = max(report.longest, made.longest)
    for reason, count in made.dropped.items():
        report.drop(reason, count)
    report.num_split += made.num_split
    for kind, note in made.notes.items():
        report.note(kind, note.num_rows, note.example)
    for name, count in made.unread.items():
        report.unread[name] = report.unread.get(name, 0) + count
    report.faults += made.faults[: SHOWN_FAULTS - len(report.faults)]


def _refuse_nothing(report: SourceReport, table: DataTable, where: str) -> None:
    if report.num_kept:
        return
    if not report.num_read:
        raise DataError(f"{where} {report.path}: has no rows")
    first = "".join(f"\n  {fault}" for fault in report.faults)
    raise DataError(
        f"{where} {report.path}: none of its {report.num_read:,} rows can be trained: {report.reasons()} "
        f"(max_length = {table.max_length}, longest row {report.longest:,} tokens){first}"
    )


def _add_percentiles(writer: Writer, reports: list[SourceReport]) -> None:
    lengths_N = writer.lengths()
    begin = 0
    for report in reports:  # rows are written source by source
        lengths_S = np.sort(lengths_N[begin : begin + report.num_kept])
        begin += report.num_kept
        percentiles = {
            name: lengths_S[min(len(lengths_S) - 1, int(q * len(lengths_S)))] for name, q in _PERCENTILES.items()
        }
        report.lengths = {name: int(value) for name, value in percentiles.items()}


_PERCENTILES = {"p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99, "max": 1.0}


def with_distinct_labels(sources: list[RowSource]) -> list[RowSource]:
    """Call two files of one name by their whole path, or messages would name either."""
    labels = [file.label for source in sources for file in source.files]
    twice = {label for label in labels if labels.count(label) > 1}
    return (
        [
            replace(
                source,
                files=tuple(
                    replace(file, label=str(file.path)) if file.label in twice else file for file in source.files
                ),
            )
            for source in sources
        ]
        if twice
        else sources
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
