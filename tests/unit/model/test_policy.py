"""What objectives ask of the model: log-probabilities of tokens, in chunks, on every path of the head."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import batch, build, documents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distft.core.types import IGNORE, Batch
from distft.model import cross_entropy
from distft.model.policy import ModelPolicy

ROWS = documents([40, 17, 33])


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


def reference(model: torch.nn.Module, micro: Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities of the labels by full logits of transformers' model, one document at a time."""
    found = []
    bounds = micro.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        labels = micro.labels_T[start:end]
        logits = model.transformer(input_ids=micro.input_ids_T[None, start:end], use_cache=False).logits[0]
        kept = labels != IGNORE
        found.append(F.log_softmax(logits.float() / temperature, -1)[kept].gather(1, labels[kept, None])[:, 0])
    return torch.cat(found)


METHODS = {
    "full": ("full", {}, 1.0),
    "lora": ("lora", {"target_modules": ["q_proj", "lm_head"]}, 1.0),
    "full at 0.6": ("full", {}, 0.6),
    "lora at 1.7": ("lora", {"target_modules": ["q_proj", "lm_head"]}, 1.7),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("tokens", [7, 10_000], ids=["chunks", "one"])
def test_log_probabilities_are_those_of_full_logits(
    tiny_config: Path, case: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, params, temperature = METHODS[case]
    monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda vocabulary: tokens)
    micro = batch(ROWS, trained_from=3)
    gradients, values = [], []
    for ours in (True, False):
        built = build(tiny_config, method, params=params, attention="eager" if not ours else "varlen")
        if method == "lora":
            for name, param in built.module.named_parameters():
                if "lora_B" in name:  # zero at the start
                    torch.manual_seed(len(name))
                    param.data.normal_(std=0.1)
        policy = ModelPolicy(built.module, temperature=temperature)
        got = policy.token_logprobs(micro) if ours else reference(built.module, micro, temperature)
        assert got.dtype == torch.float32
        assert len(got) == micro.num_supervised
        (got * torch.linspace(0.5, 1.5, len(got))).sum().backward()
        values.append(got.detach())
        gradients.append({n: p.grad for n, p in built.module.named_parameters() if p.grad is not None})
    assert torch.allclose(*values, rtol=1e-6, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        largest = gradients[1][name].abs().max()
        assert (gradient - gradients[1][name]).abs().max() <= 2e-6 * largest + 1e-7, name


def test_logits_of_all_tokens_never_exist(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the forward nor in the backward pass."""
    micro = batch(ROWS)
    whole = micro.num_supervised * 256
    sizes = {}
    for tokens in (8, 10_000):
        monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda vocabulary, tokens=tokens: tokens)
        policy = ModelPolicy(build(tiny_config).module)
        with Largest() as seen:
            policy.token_logprobs(micro).sum().backward()
        sizes[tokens] = seen.numel
    assert sizes[10_000] >= whole, "else this test would see nothing"
    assert sizes[8] < whole


def test_a_micro_batch_without_labels_has_a_gradient_of_every_parameter(tiny_config: Path) -> None:
    """Ranks run the same collectives whatever rows they have."""
    built = build(tiny_config)
    micro = batch([[5, 6, 7]], trained_from=9)
    got = ModelPolicy(built.module).token_logprobs(micro)
    assert got.shape == (0,)
    got.sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in built.module.parameters())
