"""The head's loss: chunks change memory, never the numbers; unsupervised positions never reach it."""

from pathlib import Path

import pytest
import torch
from tiny import batch, build, documents

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


def test_chunked_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what autograd keeps, which is what decides whether a long batch fits."""
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    labels = torch.randint(0, 512, (256,))
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 512 * 16)

    def saved_bytes(loss) -> int:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            loss(hidden, weight, None, labels)
        return sum(t.numel() * t.element_size() for t in kept.values())

    assert saved_bytes(cross_entropy.full_loss) > 256 * 512 * 4
    assert saved_bytes(cross_entropy.chunked_loss) < 0.2 * 256 * 512 * 4


def test_only_supervised_positions_reach_the_head(tiny_config: Path) -> None:
    model = build(tiny_config)
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


def test_fused_says_what_it_needs() -> None:
    with pytest.raises(MachineError, match=r"liger-kernel package and a GPU"):
        cross_entropy.choose("fused", torch.device("cpu"))
    assert cross_entropy.choose("auto", torch.device("cpu")) is cross_entropy.chunked_loss
