"""Keys and values of full attention in buffers that have room for more tokens.

transformers' dynamic cache joins what is there with every new token, and so copies everything that it has at each.

B rows, H heads, K positions, D head size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Positions that a buffer has more than are needed when it is made."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are the first positions of larger buffers.

    What replaces either by another tensor makes new buffers at the next token.
    """

    def __init__(self, most: float = math.inf) -> None:
        """Hold nothing yet; `most`: positions that there will be, for which there is no need of more room."""
        super().__init__()
        self._most = most
        self.keys: Any  # transformers' types say that there may be none
        self.values: Any
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        """What `update` gave last: while `keys` and `values` are these, they lie in the buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new positions behind those that are there; return all, [B, H, K, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        keys, values = self._with_room(key_states, value_states, begin, end)
        keys.narrow(2, begin, end - begin).copy_(key_states)
        values.narrow(2, begin, end - begin).copy_(value_states)
        self.keys, self.values = self._views = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self._views

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order, with the room that there was."""
        filled = self.get_seq_length()
        if filled == 0:
            return
        keys, values = (
            _selected(buffer, indices, filled) for buffer in self._with_room(self.keys, self.values, filled, filled)
        )
        self._buffers, self._views = (keys, values), None
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def reset(self) -> None:
        """Hold nothing again."""
        self._buffers = self._views = None
        super().reset()

    def _with_room(self, keys: Tensor, values: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the buffers, made anew where they end before `end` or are not what `keys` and `values` lie in."""
        held = self._buffers
        if held is not None and held[0].shape[-2] >= end and self._is_of(held):
            return held
        made: list[Tensor] = []
        for new, old in ((keys, self.keys), (values, self.values)):
            length = max(end, int(min(end + ROOM, self._most)))
            buffer = new.new_empty((*new.shape[:2], length, new.shape[-1]))
            if begin:
                buffer[:, :, :begin] = old
            made.append(buffer)
        self._buffers, self._views = (made[0], made[1]), None
        return self._buffers

    def _is_of(self, held: tuple[Tensor, Tensor]) -> bool:
        views = self._views
        if views is not None and self.keys is views[0] and self.values is views[1]:
            return True
        return all(
            tensor.data_ptr() == buffer.data_ptr() and tensor.shape[0] == buffer.shape[0]
            for tensor, buffer in zip((self.keys, self.values), held, strict=True)
        )


def _selected(buffer: Tensor, indices: Tensor, filled: int) -> Tensor:
    made = buffer.new_empty((len(indices), *buffer.shape[1:]))
    torch.index_select(buffer[:, :, :filled], 0, indices, out=made[:, :, :filled])
    return made


def use_growing_layers(cache: Cache, most: float = math.inf) -> Cache:
    """Put growing layers in place of a fresh cache's full-attention ones; other kinds stay.

    `most`: positions that it will hold.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(most)
    if cache.layer_class_to_replicate is DynamicLayer:
        made: Any = functools.partial(GrowingLayer, most)
        cache.layer_class_to_replicate = made
    return cache
