"""One rank's pieces to one `.distcp` file through torch.distributed.checkpoint, without its collectives.

Only DCP's public storage interface is used (set_up, prepare, write_data, finish); who writes what is known already, so
there is nothing to plan together. `.metadata` is written for DCP's own tools; distft never unpickles one: it reads
`index.json`, which says the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from distft.checkpoint.intervals import Chunk, Piece, TensorEntry, check_piece, split_chunks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.storage import WriteResult

DCP_METADATA = ".metadata"
DCP_CHUNKS = 200_000
"""Beyond these a save does without it: a million take a minute to pickle, in which 512 GPUs wait. `write_dcp_metadata`
makes it at any later time from the entries of `parse_index`."""

Part = tuple[str, int, str, Chunk | None]
"""Name, elements of the whole tensor, dtype, and where the chunk lies (None: an empty piece)."""


def write_pieces(folder: Path, pieces: Iterable[Piece], *, rank: int, halfway: Callable[[], None]) -> list[Part]:
    """Write one rank's pieces; nothing is synced yet.

    Args:
        folder: where the checkpoint is being made.
        pieces: on any device; at most one chunk is copied to the host at a time.
        rank: names the file.
        halfway: called once in the middle of writing (for injected faults).

    Returns:
        What was written where.

    Raises:
        PieceError: a piece lies outside its tensor.
        OSError: or torch's error around one: the disk did not take it.
    """
    pieces = list(pieces)
    for piece in pieces:
        check_piece(piece)
    chunks = list(split_chunks(pieces))
    parts: list[Part] = [(p.name, p.numel, _dtype_name(p), None) for p in pieces if p.length == 0]
    if not chunks:
        halfway()
        return parts
    planner = _Planner(chunks, halfway)
    writer = _writer(folder)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    numbered = writer.prepare_global_plan([plan] * (rank + 1))[rank]  # gives the file its rank
    results = {(result.index.fqn, result.index.offset): result for result in _results(writer, numbered, planner)}
    for piece in chunks:
        stored = results[piece.name, torch.Size((piece.start,))].storage_data
        chunk = Chunk(piece.start, piece.length, stored.relative_path, stored.offset, stored.length)
        parts.append((piece.name, piece.numel, _dtype_name(piece), chunk))
    return parts


def write_dcp_metadata(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Write and sync the `.metadata` that makes the folder an ordinary DCP checkpoint of 1-D tensors."""
    tensors: dict[str, Any] = {}
    results: list[WriteResult] = []
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # private, and only for other people's tools
    from torch.distributed.checkpoint.storage import WriteResult

    for name, entry in entries.items():
        chunks = [ChunkStorageMetadata(torch.Size((c.start,)), torch.Size((c.length,))) for c in entry.chunks]
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size((entry.numel,)), chunks)
        results.extend(
            WriteResult(MetadataIndex(name, (c.start,)), c.num_bytes, _StorageInfo(c.file, c.offset, c.num_bytes))
            for c in entry.chunks
        )
    _writer(folder, sync=True).finish(Metadata(tensors), [results])


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Return metadata without the folder's path and a random id, which would tie the bytes to one save."""
        return StorageMeta()


def _writer(folder: Path, *, sync: bool = False) -> _Writer:
    # no copy-ahead: it would open a CUDA context on the writer thread's device 0 for data that is on the host already
    writer = _Writer(folder, single_file_per_rank=True, sync_files=sync, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(False)
    return writer


def _results(writer: _Writer, plan: SavePlan, planner: _Planner) -> list[WriteResult]:
    return writer.write_data(plan, planner).wait()


def _dtype_name(piece: Piece) -> str:
    return str(piece.data.dtype).removeprefix("torch.")


class _Planner(SavePlanner):
    """Pairs each chunk with its place in the global tensor."""

    def __init__(self, chunks: list[Piece], halfway: Callable[[], None]) -> None:
        self._chunks = {(piece.name, torch.Size((piece.start,))): piece for piece in chunks}
        self._halfway, self._left = halfway, 1 + len(chunks) // 2

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Do nothing: the pieces are known from the start."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        self._left -= 1
        if self._left == 0:
            self._halfway()
        index = write_item.index
        assert index.offset is not None
        return self._chunks[index.fqn, index.offset].read().contiguous()


def _write_item(piece: Piece) -> WriteItem:
    start, length = torch.Size((piece.start,)), torch.Size((piece.length,))
    return WriteItem(
        index=MetadataIndex(piece.name, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(start, length),
            properties=TensorProperties(dtype=piece.data.dtype),
            size=torch.Size((piece.numel,)),
        ),
    )
