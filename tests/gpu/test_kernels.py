"""Kernels that exist on a GPU only compute what their plain counterparts compute.

T tokens of all documents, H query heads, G key-value heads, D head size; S supervised tokens, E hidden, V vocabulary.
"""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import batch, build, documents
from torch import Tensor, nn

from distft.core.types import Batch
from distft.model import attention, cross_entropy
from distft.model.quantize import is_4bit
from distft.optim import OPTIMIZERS

pytestmark = pytest.mark.gpu

LENGTHS = [1, 17, 128, 300, 66]
H, G, D = 8, 2, 64


def placed(micro: Batch, device: torch.device) -> Batch:
    tensors = {name: value.to(device) for name, value in vars(micro).items() if isinstance(value, Tensor)}
    return dataclasses.replace(micro, **tensors)


# -- attention -------------------------------------------------------------------------------------------------------


def by_document(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, bounds: list[int], window: int | None) -> Tensor:
    """[T, H, D]: each document through SDPA by itself, key-value heads repeated, the window as an explicit mask."""
    pieces = []
    for start, end in pairwise(bounds):
        q, k, v = (x[:, start:end] for x in (q_HTD, k_GTD, v_GTD))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        at = torch.arange(end - start, device=q.device)
        back = at[:, None] - at[None, :]
        seen = (back >= 0) & (back < (window or end))
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(pieces, dim=1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 32])
def test_varlen_flash_equals_each_document_by_itself(device: torch.device, window: int | None) -> None:
    """No further from fp32 than twice what bf16 SDPA is: outputs and the gradients of q, k and v."""
    generator = torch.Generator(device).manual_seed(0)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    total = int(bounds[-1])

    def normal(heads: int) -> Tensor:
        return torch.randn(heads, total, D, device=device, generator=generator).bfloat16()

    inputs, upstream = [normal(H), normal(G), normal(G)], normal(H).transpose(0, 1)

    def run(dtype: torch.dtype, kernel) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = kernel(*leaves)
        out.backward(upstream.to(dtype))
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = attention.varlen_attention(
            nn.Module(), q[None], k[None], v[None], None, cu_seq_lens_q=bounds.int().to(device),
            max_length_q=max(LENGTHS), sliding_window=window,
        )  # fmt: skip
        assert weights is None
        return out[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_document(q, k, v, bounds.tolist(), window)

    exact, ours, theirs = run(torch.float32, plain), run(torch.bfloat16, varlen), run(torch.bfloat16, plain)
    for name, wanted, got, half in zip(("out", "dq", "dk", "dv"), exact, ours, theirs, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 2 * (half - wanted).abs().max() + 1e-3, name


def test_varlen_memory_is_linear_in_tokens(device: torch.device) -> None:
    """32 k tokens: all scores at once would be 16 GiB."""
    total = 32_768
    q, k, v = (torch.randn(1, heads, total, D, device=device, dtype=torch.bfloat16) for heads in (H, G, G))
    bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
    torch.cuda.reset_peak_memory_stats()
    attention.varlen_attention(nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=total)
    assert torch.cuda.max_memory_allocated() < 2**30


def test_packing_never_leaks_on_the_flash_kernel(device: torch.device, tiny_config: Path) -> None:
    model = build(tiny_config, device=device, dtype="bfloat16", attention="varlen", cross_entropy="full").module
    rows = documents([40, 7, 90, 23])
    with torch.no_grad():
        together = model(**placed(batch(rows), device).inputs())
        alone = torch.cat([model(**placed(batch([row]), device).inputs()) for row in rows])
        changed = model(**placed(batch([rows[0][::-1], *rows[1:]]), device).inputs())
    assert (together - alone).abs().max() < 0.05, "bf16 rounding: products of another shape sum in another order"
    assert torch.equal(changed[39:], together[39:]), "another first document changes nothing in the others"


# -- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_fused_loss_equals_chunked(
    device: torch.device, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 32_000 * 700)  # several chunks
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(3_000, 256, device=device, generator=generator).to(dtype)
    weight = (torch.randn(32_000, 256, device=device, generator=generator) / 16).to(dtype)
    labels = torch.randint(0, 32_000, (3_000,), device=device, generator=generator)
    results = []
    for loss in (cross_entropy.fused_loss, cross_entropy.chunked_loss):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = loss(*leaves, None, labels).sum()
        total.backward()
        results.append([total.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    for name, fused, chunked in zip(("loss", "hidden", "weight"), *results, strict=True):
        assert (fused - chunked).norm() / chunked.norm() < bound, name


# -- 4-bit weights and paged optimizers ------------------------------------------------------------------------------


def test_a_4bit_base_trains_its_adapters_and_evaluation_does_not_touch_it(
    device: torch.device, tiny_config: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = build(tiny_config, "qlora", device=device, dtype="bfloat16", params={"r": 4}).module
    layers = {name: layer for name, layer in model.named_modules() if is_4bit(layer)}
    assert len(layers) == 14
    assert all(layer.weight.is_cuda and layer.weight.quant_state is not None for layer in layers.values())

    def stored() -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (layer.weight.data.view(torch.uint8).clone(), layer.weight.quant_state.absmax.clone())
            for name, layer in layers.items()
        }

    before, micro = stored(), placed(batch(documents([30, 12])), device).inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**micro).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        first, again = model(**micro), model(**micro)
    model.train()
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(first, again)
    for name, (packed, absmax) in stored().items():
        assert torch.equal(packed, before[name][0]), name
        assert torch.equal(absmax, before[name][1]), name


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_moments_are_in_managed_memory_from_1e5_elements(device: torch.device, name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    spec = OPTIMIZERS[name]
    torch.manual_seed(0)
    start = [torch.randn(size, device=device) for size in (131_072, 8_192)]
    large, small = (nn.Parameter(value.clone()) for value in start)
    optimizer = spec.build(spec.params(learning_rate=1e-2), [{"params": [large, small], "weight_decay": 0.0}])
    twins = [nn.Parameter(value.clone()) for value in start]
    reference = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        for param, twin in zip((large, small), twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        optimizer.step()
        reference.step()
    torch.cuda.synchronize()
    for moment in ("state1", "state2"):
        assert getattr(optimizer.state[large][moment], "is_paged", False), moment
        assert not getattr(optimizer.state[small][moment], "is_paged", False), "small tensors stay on the device"
    bound = 1e-5 if "32bit" in name else 2e-2
    for param, twin in zip((large, small), twins, strict=True):
        assert (param - twin).abs().max() < bound
        assert (param - twin).abs().mean() < bound / 4
