"""Packing never leaks: a packed document has the logits it has alone, on every attention that runs here."""

from pathlib import Path

import pytest
import torch
from tiny import batch, build, documents

from distft.model.cross_entropy import full_loss

LENGTHS = [17, 1, 40, 2, 9]


def logits(model, packed) -> torch.Tensor:
    with torch.no_grad():
        return model.module.transformer(
            input_ids=packed.input_ids_T[None],
            position_ids=packed.position_ids_T[None],
            use_cache=False,
            cu_seq_lens_q=packed.cu_seqlens,
            cu_seq_lens_k=packed.cu_seqlens,
            max_length_q=packed.max_seqlen,
            max_length_k=packed.max_seqlen,
        ).logits[0]


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager", "auto"])
def test_a_packed_document_has_the_logits_it_has_alone(tiny_config: Path, attention: str) -> None:
    model = build(tiny_config, attention=attention)
    model.module.eval()
    rows = documents(LENGTHS)
    together = logits(model, batch(rows)).split(LENGTHS)
    for row, packed in zip(rows, together, strict=True):
        with torch.no_grad():  # alone, through plain transformers: no positions, no bounds
            model.module.transformer.set_attn_implementation("eager")
            alone = model.module.transformer(torch.tensor([row])).logits[0]
        assert torch.allclose(packed, alone, atol=1e-6), (packed - alone).abs().max()


def test_losses_of_documents_do_not_depend_on_their_neighbours(tiny_config: Path) -> None:
    model = build(tiny_config)
    model.module.use_loss(full_loss)
    rows = documents(LENGTHS)
    with torch.no_grad():
        together = model.module(**batch(rows).inputs())
        apart = torch.cat([model.module(**batch([row]).inputs()) for row in rows if len(row) > 1])
    assert torch.allclose(together, apart, atol=1e-6)


def test_a_mask_or_a_cache_is_refused(tiny_config: Path) -> None:
    model = build(tiny_config).module.transformer
    packed = batch(documents([5, 4]))
    bounds = {"cu_seq_lens_q": packed.cu_seqlens, "cu_seq_lens_k": packed.cu_seqlens}
    ids, positions = packed.input_ids_T[None], packed.position_ids_T[None]
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids=ids, position_ids=positions, use_cache=False)  # bounds forgotten
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids=ids.repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False, **bounds)
    from distft.model.attention import varlen_attention

    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="no attention_mask"):
        varlen_attention(model, q, k, k, torch.ones(1, 1, 9, 9), cu_seq_lens_q=packed.cu_seqlens)
    longer = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="use_cache=False"):
        varlen_attention(model, q, longer, longer, None, cu_seq_lens_q=packed.cu_seqlens)


def test_a_sliding_window_is_honoured() -> None:
    from distft.model.attention import varlen_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    got, _ = varlen_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, sliding_window=4)
    at = torch.arange(12)
    back = at[:, None] - at[None, :]
    scores = (q @ k.transpose(-1, -2)) / 8**0.5
    wanted = scores.masked_fill(~((back >= 0) & (back < 4)), float("-inf")).softmax(-1) @ v
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-6)
