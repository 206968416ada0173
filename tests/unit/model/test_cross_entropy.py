"""The head's loss: chunks change memory, never the numbers; unsupervised positions never reach it."""

from pathlib import Path

import pytest
import torch
from tiny import batch, build, documents
from torch.utils.checkpoint import checkpoint

from distft.core.errors import MachineError
from distft.model import cross_entropy


def losses_and_gradients(loss, hidden, weight, labels):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = loss(hidden, weight, None, labels)
    (out * torch.linspace(0.5, 1.5, len(out))).sum().backward()
    return out.detach(), hidden.grad, weight.grad


def test_chunked_equals_full_for_any_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(37, 16), torch.randn(300, 16), torch.randint(0, 300, (37,))
    whole = losses_and_gradients(cross_entropy.full_loss, hidden, weight, labels)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 300 * 8)  # eight rows at a time
    pieces = losses_and_gradients(cross_entropy.chunked_loss, hidden, weight, labels)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_head_under_an_adapter_has_the_losses_of_the_merged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(37, 16), torch.randn(300, 16), torch.randint(0, 300, (37,))
    bias, down, up = torch.randn(300), torch.randn(4, 16), torch.randn(300, 4)
    factors = torch.linspace(0.5, 1.5, 37)

    def gradients(loss):
        inputs = [x.clone().requires_grad_() for x in (hidden, down, up)]
        out = loss(*inputs)
        (out * factors).sum().backward()
        return out.detach(), *(x.grad for x in inputs)

    whole = gradients(lambda h, a, b: cross_entropy.full_loss(h, weight + b @ a, bias, labels))
    likely = cross_entropy.likelihoods(hidden, weight + up @ down, bias, labels)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 300 * 8)

    def ours(said, h, a, b):
        return cross_entropy.with_adapter(said, h, h @ a.T, weight, bias, b, labels)

    pieces = gradients(lambda h, a, b: ours(cross_entropy.chunked_sum, h, a, b))
    for x, y in zip(whole, pieces, strict=True):
        assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)
    assert torch.allclose(ours(cross_entropy.likelihoods, hidden, down, up), likely, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, True)])
def test_the_sum_has_the_gradients_of_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    """Whichever of hidden, weight and bias are trained; the factor behind the loss is one that bf16 would round."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 300 * 8)
    torch.manual_seed(0)
    made = [torch.randn(37, 16), torch.randn(300, 16), torch.randn(300)]
    labels = torch.randint(0, 300, (37,))
    results = []
    for loss, kind in ((cross_entropy.full_loss, torch.float64), (cross_entropy.chunked_sum, dtype)):
        inputs = [x.to(dtype).to(kind).requires_grad_(want) for x, want in zip(made, trained, strict=True)]
        out = loss(*inputs, labels).sum()
        (out * (1 / 515)).backward()
        results.append((out.detach(), *(x.grad for x in inputs)))
    near = 2e-6 if dtype == torch.float32 else 1e-2
    for plain, ours, want in zip(*results, [True, *trained], strict=True):
        assert (ours is not None) == want
        if want:
            assert (plain - ours.double()).norm() <= near * plain.norm()


def test_the_sum_gives_its_gradients_once_and_none_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 9 * 2)  # two rows at a time
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = cross_entropy.chunked_sum(hidden, weight, None, torch.arange(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()
    with torch.no_grad():
        assert not cross_entropy.chunked_sum(hidden, weight, None, torch.arange(5)).requires_grad


@pytest.mark.parametrize("loss", [cross_entropy.chunked_loss, cross_entropy.chunked_sum])
def test_chunked_never_holds_all_logits(loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what autograd keeps, which is what decides whether a long batch fits."""
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    labels = torch.randint(0, 512, (256,))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 512 * 16)

    def saved_bytes(of) -> int:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            of(hidden, weight, None, labels)
        return sum(t.numel() * t.element_size() for t in kept.values())

    assert saved_bytes(cross_entropy.full_loss) > 256 * 512 * 4
    assert saved_bytes(loss) < 0.2 * 256 * 512 * 4


def of_many_chunks(loss, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Gradients of (weight, bias, an adapter's second matrix) over 64 chunks that agree: every sum grows steadily."""
    generator = torch.Generator().manual_seed(0)
    hidden = (1 + 0.1 * torch.randn(8, 16, generator=generator)).repeat(64, 1)
    labels = torch.randint(0, 40, (8,), generator=generator).repeat(64)
    made = [0.1 * torch.randn(*shape, generator=generator) for shape in ((40, 16), (40,), (40, 4))]
    inputs = [x.to(dtype).requires_grad_() for x in made]
    loss(hidden.to(dtype), labels, *inputs).sum().backward()
    return tuple(x.grad.double() for x in inputs if x.grad is not None)


@pytest.mark.parametrize("name", ["chunked_sum", "chunked_loss", "with_adapter"])
def test_chunks_gradients_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The error of 64 additions in bf16 is 0.8 % and more; of one rounding 0.2 %."""

    def loss(hidden, labels, weight, bias, up):
        if name == "with_adapter":
            inner = hidden[:, :4].contiguous()
            return cross_entropy.with_adapter(cross_entropy.chunked_sum, hidden, inner, weight, bias, up, labels)
        return getattr(cross_entropy, name)(hidden, weight, bias, labels)

    whole = of_many_chunks(loss, torch.float64)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 40 * 8)  # the eight rows that repeat
    one = torch.cat([x.flatten() for x in of_many_chunks(loss, torch.float32)])
    exact = torch.cat([x.flatten() for x in whole])
    assert (one - exact).norm() < 1e-5 * exact.norm()
    for ours, plain in zip(of_many_chunks(loss, torch.bfloat16), whole, strict=True):
        assert (ours - plain).norm() < 4e-3 * plain.norm()
        assert abs((ours * plain).sum() / (plain * plain).sum() - 1) < 2e-3, "a lossy sum is too small"


def test_in_fp32_chunks_give_what_a_checkpoint_of_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(37, 16), torch.randn(300, 16), torch.randint(0, 300, (37,))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 300 * 8)

    def checkpoints(hidden_SE, weight_VE, bias_V, labels_S):
        chunks = zip(hidden_SE.split(8), labels_S.split(8), strict=True)
        full = cross_entropy.full_loss
        return torch.cat([checkpoint(full, h, weight_VE, bias_V, y, use_reentrant=False) for h, y in chunks])

    theirs = losses_and_gradients(checkpoints, hidden, weight, labels)
    ours = losses_and_gradients(cross_entropy.chunked_loss, hidden, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_only_supervised_positions_reach_the_head(tiny_config: Path) -> None:
    model = build(tiny_config)
    model.module.use_loss(cross_entropy.full_loss)
    seen = []
    model.module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    packed = batch(documents([20, 30]), trained_from=15)
    assert model.module(**packed.inputs()).shape == (packed.num_supervised,)
    assert seen == [packed.num_supervised] == [20]


def test_a_batch_without_labels_gives_zero_with_every_gradient(tiny_config: Path) -> None:
    model = build(tiny_config)
    nothing = batch(documents([6]), trained_from=99)
    loss = model.module(**nothing.inputs()).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.module.parameters())


def test_chunks_are_whole_tiles_where_they_are_large() -> None:
    """Of a GPU's matrix product, whose tiles have 128 rows: 261 tokens take as long as 384."""
    assert cross_entropy.chunk_tokens(128_256) == 512
    assert cross_entropy.chunk_tokens(262_144) == 256
    assert cross_entropy.chunk_tokens(151_936) % 128 == 0
    assert cross_entropy.chunk_tokens(1_000_000) == 67, "one unfinished tile holds no more than fits"
    for vocabulary in (32_000, 128_256, 1_000_000):
        assert 4 * vocabulary * cross_entropy.chunk_tokens(vocabulary) <= cross_entropy.CHUNK_BYTES


def test_fused_says_what_it_needs() -> None:
    with pytest.raises(MachineError, match=r"cannot run here: it needs a CUDA device"):
        cross_entropy.choose("fused", torch.device("cpu"))
    assert cross_entropy.choose("auto", torch.device("cpu")) is cross_entropy.chunked_sum
    assert cross_entropy.choose("auto", torch.device("cpu"), per_token=True) is cross_entropy.chunked_loss
