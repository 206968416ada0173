"""Any interval of any tensor out of a verified checkpoint, whoever wrote it on however many ranks."""

from __future__ import annotations

import bisect
import difflib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distft.checkpoint.durable import open_regular
from distft.checkpoint.intervals import Chunk, TensorEntry
from distft.core.errors import CheckpointError, explain

if TYPE_CHECKING:
    from torch import Tensor


ZIP = b"PK\x03\x04"


class Reader:
    """Reads intervals; holds one chunk (64 MiB at most) besides what was asked for."""

    def __init__(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._folder, self._entries = folder, entries
        self._starts = {name: [chunk.start for chunk in entry.chunks] for name, entry in entries.items()}
        self._last: tuple[Chunk, Tensor] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Return the elements, dtype and chunks of one tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        entry = self._entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f", nearest: {near[0]}" if near else ""
            raise CheckpointError(f'{self._folder.name} has no tensor "{name}" ({len(self)} tensors{hint})')
        return entry

    def numel(self, name: str) -> int:
        """Return the number of elements of the whole tensor."""
        return self.entry(name).numel

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements [start, stop) of a flattened tensor.

        Args:
            name: see `Piece`.
            start: first element.
            stop: one past the last element, None for the tensor's end.

        Returns:
            1-D on the CPU, of the dtype it was saved with; the caller's own copy.

        Raises:
            CheckpointError: no such tensor or interval, or the file does not hold what the index says.
        """
        entry = self.entry(name)
        stop = entry.numel if stop is None else stop
        if not 0 <= start <= stop <= entry.numel:
            raise CheckpointError(f"{name}: no elements [{start}, {stop}) in a tensor of {entry.numel}")
        wanted = torch.empty(stop - start, dtype=entry.dtype)
        if start == stop:
            return wanted
        index = bisect.bisect_right(self._starts[name], start) - 1
        for chunk in entry.chunks[index:]:
            if chunk.start >= stop:
                break
            begin, end = max(start, chunk.start), min(stop, chunk.stop)
            data = self._chunk(name, chunk, entry.dtype)
            wanted[begin - start : end - start] = data[begin - chunk.start : end - chunk.start]
        return wanted

    def _chunk(self, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        if self._last is None or self._last[0] != chunk:
            self._last = None  # free it first: one chunk at a time
            data = _load(self._folder / chunk.file, chunk)
            if data.dtype != dtype or data.shape != (chunk.length,):
                raise CheckpointError(
                    f"{chunk.file}: {name} at {chunk.start} holds {tuple(data.shape)} {data.dtype}, "
                    f"the index says ({chunk.length},) {dtype}"
                )
            self._last = (chunk, data)
        return self._last[1]


def _load(path: Path, chunk: Chunk) -> Tensor:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(chunk.offset)
            archive = file.read(chunk.num_bytes)
    except OSError as error:
        raise CheckpointError(f"{chunk.file}: {explain(error)}") from error
    if not archive.startswith(ZIP):  # else torch tries its tar and bare-pickle formats of old
        raise CheckpointError(f"{chunk.file}: not a tensor at byte {chunk.offset} (not a torch archive)")
    try:
        data = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # on mutated bytes it raises whatever its parsers stumble over, IndexError included
        raise CheckpointError(f"{chunk.file}: not a tensor at byte {chunk.offset} ({str(error)[:120]})") from error
    if not isinstance(data, torch.Tensor) or data.layout != torch.strided or data.device.type != "cpu":
        raise CheckpointError(f"{chunk.file}: not a plain tensor at byte {chunk.offset}")
    return data
