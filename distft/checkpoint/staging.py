"""Host memory that state is copied into, so that training goes on while the copy is being written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from distft.checkpoint.intervals import CHUNK_BYTES, Piece, check_piece

if TYPE_CHECKING:
    from torch import Tensor

ALIGN_BYTES = 64


class StagingBuffer:
    """Blocks of CHUNK_BYTES, kept from save to save: allocating (and pinning) them costs more than the copy.

    Blocks have that size because torch's pinned allocator rounds up to a power of two.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._pinned = False

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return copies of the pieces in host memory, valid until the next `take`; a piece may come back in several.

        Args:
            pieces: on any device. Copies from a GPU overlap each other; the call returns when all are done.

        Raises:
            PieceError: a piece lies outside its tensor.
        """
        pieces = list(pieces)
        devices = {piece.data.device for piece in pieces if piece.data.device.type == "cuda"}
        if bool(devices) != self._pinned:
            self._blocks, self._pinned = [], bool(devices)
        staged: list[Piece] = []
        block, used = 0, 0
        for piece in pieces:
            check_piece(piece)
            if piece.length == 0:
                staged.append(Piece(piece.name, piece.start, piece.numel, piece.read().cpu()))
            begin, item_bytes = 0, piece.data.dtype.itemsize
            while begin < piece.length:
                room = (CHUNK_BYTES - used) // item_bytes
                left = piece.length - begin
                if room < left and room * item_bytes < CHUNK_BYTES // 8:  # better to start a new block than to splinter
                    block, used, room = block + 1, 0, CHUNK_BYTES // item_bytes
                count = min(left, room)
                home = self._block(block)[used : used + count * item_bytes].view(piece.data.dtype)
                # What is made here may be given back at once: the stream copies it before anything else writes there.
                home.copy_(piece.read(begin, begin + count), non_blocking=self._pinned)
                staged.append(Piece(piece.name, piece.start + begin, piece.numel, home))
                begin += count
                used += -(-count * item_bytes // ALIGN_BYTES) * ALIGN_BYTES
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def _block(self, number: int) -> Tensor:
        while len(self._blocks) <= number:
            self._blocks.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._pinned))
        return self._blocks[number]
