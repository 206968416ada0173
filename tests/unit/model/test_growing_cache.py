"""Keys and values in buffers with room are those of transformers' cache, through everything that is done to it."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from distft.model.growing_cache import ROOM, GrowingLayer, use_growing_layers


def test_a_growing_layer_is_a_dynamic_layer() -> None:
    drawn = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()

    def both(new: int, rows: int) -> None:
        # values may be narrower than keys
        states = [torch.randn(rows, 2, new, size, generator=drawn) for size in (8, 4)]
        for mine, right in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(mine, right)
        assert ours.get_seq_length() == theirs.get_seq_length()

    both(5, 3)
    held = ours.keys.data_ptr()
    both(1, 3)
    assert ours.keys.data_ptr() == held, "nothing is copied for one more token"
    chosen = torch.tensor([0, 0, 2, 1, 2])
    for layer in (ours, theirs):
        layer.batch_select_indices(chosen)
    held = ours.keys.data_ptr()
    both(1, 5)
    assert ours.keys.data_ptr() == held, "rows that are chosen keep their room"
    both(ROOM, 5)
    for layer in (ours, theirs):
        layer.crop(-3)
    both(2, 5)
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor([4, 3, 2, 1, 0]))
    both(1, 5)
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(2)
    both(1, 10)
    for layer in (ours, theirs):
        layer.reset()
    both(4, 2)


def test_no_more_room_than_is_needed() -> None:
    layer = GrowingLayer(most=7)
    for new in (5, 1, 1):
        layer.update(torch.ones(2, 1, new, 4), torch.ones(2, 1, new, 4))
    assert layer.keys.untyped_storage().nbytes() == 2 * 7 * 4 * 4
    layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert layer.get_seq_length() == 8, "more is no error"


def test_layers_of_other_kinds_stay() -> None:
    cache = DynamicCache()
    assert use_growing_layers(cache) is cache
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 1)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, GrowingLayer]
    from transformers import MistralConfig

    sliding = use_growing_layers(DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=8)))
    assert not any(type(layer) is GrowingLayer for layer in sliding.layers)
