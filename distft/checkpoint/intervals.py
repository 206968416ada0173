"""What engines hand over: intervals of flattened tensors by name, so that no layout is written into a checkpoint.

A tensor `name` of numel elements is the union of pieces [start, start + len(data)) over all ranks. On disk a piece is
one or more chunks of at most CHUNK_BYTES, each a torch archive at an offset of a rank's `.distcp` file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distft.checkpoint.manifest import is_plain_name, parse_json
from distft.core.errors import CheckpointError
from distft.core.types import Deferred, Piece

CHUNK_BYTES = 64 * 2**20
"""Bounds the memory of a reader that wants one element, and of the copy torch.save makes."""
INDEX = "index.json"
INDEX_SCHEMA = 1
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class PieceError(CheckpointError):
    """Pieces that do not describe whole tensors: a mistake of the engine; names the tensor."""


@dataclass(frozen=True)
class Chunk:
    """Where an interval of a tensor lies on disk."""

    start: int
    length: int
    """Elements."""
    file: str
    """Name inside the checkpoint's folder."""
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    """Bytes of the archive at that offset: a little more than the data."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.length


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    numel: int
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    """Sorted, tiling [0, numel)."""


def check_piece(piece: Piece) -> None:
    """Raise PieceError unless the piece lies inside its tensor."""
    if not isinstance(piece.data, Deferred) and piece.data.dim() != 1:
        raise PieceError(f"{piece.name}: a piece must be 1-D, not {piece.data.dim()}-D")
    if piece.start < 0 or piece.stop > piece.numel:
        raise PieceError(f"{piece.name}: piece [{piece.start}, {piece.stop}) is outside [0, {piece.numel})")


def split_chunks(pieces: Iterable[Piece], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """Split the pieces into ones of at most `chunk_bytes` (views, nothing is copied); empty ones are left out."""
    for piece in pieces:
        length = max(1, chunk_bytes // piece.data.dtype.itemsize)
        for begin in range(0, piece.length, length):
            yield piece.part(begin, min(begin + length, piece.length))


def tensor_entries(parts: Iterable[tuple[str, int, str, Chunk | None]]) -> dict[str, TensorEntry]:
    """Assemble the entries of whole tensors from the chunks that all ranks wrote.

    Args:
        parts: (name, numel, dtype, chunk) of every chunk of every rank; the chunk is None for an empty piece.

    Raises:
        PieceError: ranks disagree about a tensor, or its chunks leave a gap or overlap.
    """
    shapes: dict[str, tuple[int, str]] = {}
    chunks: dict[str, list[Chunk]] = {}
    for name, numel, dtype, chunk in parts:
        if shapes.setdefault(name, (numel, dtype)) != (numel, dtype):
            first, second = (f"{n} x {d}" for n, d in (shapes[name], (numel, dtype)))
            raise PieceError(f"{name}: {first} on one rank, {second} on another")
        chunks.setdefault(name, []).extend([chunk] if chunk else [])
    entries: dict[str, TensorEntry] = {}
    for name in sorted(shapes):
        numel, dtype = shapes[name]
        ordered = tuple(sorted(chunks[name], key=lambda chunk: chunk.start))
        check_tiling(name, numel, ordered)
        entries[name] = TensorEntry(numel, DTYPES[dtype], ordered)
    return entries


def check_tiling(name: str, numel: int, chunks: Iterable[Chunk]) -> None:
    """Raise PieceError unless the sorted chunks cover [0, numel) exactly once."""
    covered = 0
    for chunk in chunks:
        if chunk.start > covered:
            raise PieceError(f"{name}: nobody wrote elements [{covered}, {chunk.start}) of {numel}")
        if chunk.start < covered:
            raise PieceError(f"{name}: elements [{chunk.start}, {min(covered, chunk.stop)}) of {numel} written twice")
        covered = chunk.stop
    if covered != numel:
        what = f"nobody wrote elements [{covered}, {numel}) of" if covered < numel else f"{covered} elements instead of"
        raise PieceError(f"{name}: {what} {numel}")


def index_bytes(entries: Mapping[str, TensorEntry]) -> bytes:
    """Return `index.json`: everything a reader needs, without a pickle.

    On one line: only then does Python encode in C, and all ranks wait for the million chunks of 512 of them.
    """
    tensors = {
        name: {
            "numel": entry.numel,
            "dtype": str(entry.dtype).removeprefix("torch."),
            "chunks": [[c.start, c.length, c.file, c.offset, c.num_bytes] for c in entry.chunks],
        }
        for name, entry in entries.items()
    }
    document = {"schema": INDEX_SCHEMA, "tensors": tensors}
    return (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def parse_index(data: bytes, file_bytes: Mapping[str, int]) -> dict[str, TensorEntry]:
    """Read `index.json`.

    Args:
        data: the file.
        file_bytes: name -> length of the files that chunks may lie in (from the manifest).

    Raises:
        CheckpointError: it is anything but an index of these files.
    """
    document = parse_json(data, INDEX)
    if set(document) != {"schema", "tensors"} or document["schema"] != INDEX_SCHEMA:
        raise CheckpointError(f"{INDEX}: not an index of schema {INDEX_SCHEMA}")
    tensors = document["tensors"]
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{INDEX}: tensors is not a table")
    return {name: _parse_entry(name, raw, file_bytes) for name, raw in tensors.items()}


def _parse_entry(name: str, raw: Any, file_bytes: Mapping[str, int]) -> TensorEntry:
    if not isinstance(raw, dict) or set(raw) != {"numel", "dtype", "chunks"}:
        raise CheckpointError(f"{INDEX}: {name}: not a tensor entry")
    numel, dtype, chunks = raw["numel"], raw["dtype"], raw["chunks"]
    if not _is_count(numel) or not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(chunks, list):
        raise CheckpointError(f"{INDEX}: {name}: bad numel, dtype or chunks")
    parsed = tuple(_parse_chunk(name, chunk, file_bytes) for chunk in chunks)
    check_tiling(name, numel, parsed)
    return TensorEntry(numel, DTYPES[dtype], parsed)


def _parse_chunk(name: str, raw: Any, file_bytes: Mapping[str, int]) -> Chunk:
    if not isinstance(raw, list) or len(raw) != 5:
        raise CheckpointError(f"{INDEX}: {name}: not a chunk: {str(raw)[:80]}")
    start, length, file, offset, num_bytes = raw
    counts = all(_is_count(value) for value in (start, length, offset, num_bytes)) and length > 0
    if not counts or not isinstance(file, str) or not is_plain_name(file) or file not in file_bytes:
        raise CheckpointError(f"{INDEX}: {name}: bad chunk {str(raw)[:80]}")
    if offset + num_bytes > file_bytes[file]:
        raise CheckpointError(f"{INDEX}: {name}: chunk lies beyond the end of {file}")
    return Chunk(start, length, file, offset, num_bytes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
