"""What a model's own forward does between its last hidden state and its logits, found by running it.

The trunk and the head are replaced for one call by stand-ins that return known numbers, so that only the model's own
lines in between run. Scales and a soft cap are read off; whatever else happens there is not guessed at.

Shape letters: T positions of the probe, E hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distft.model.bugs import raise_mistakes
from distft.model.logit_rule import LogitRule
from distft.model.precision import in_double

_POSITIONS = 3
_RTOL = 1e-5


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Where a model's last hidden states come from, and what becomes of them."""

    trunk: str
    """Name of the module inside the model whose output the head reads."""
    rule: LogitRule


def observe(lm: Any) -> Observation | None:
    """Return how `lm` turns its last hidden states into logits, or None when it is done in another way.

    None also when the model has no trunk of its own, when its head is not linear, or when its forward does not get
    along with the stand-ins: then only the model's own forward gives its logits.
    """
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    for name in _trunks(lm):
        rule = _observed(lm, lm.get_submodule(name), head)
        if rule is not None:
            return Observation(trunk=name, rule=rule)
    return None


def _trunks(lm: Any) -> list[str]:
    """Return the names of the modules that may be the trunk."""
    names = {id(module): name for name, module in lm.named_modules() if name}
    candidates = (lm.base_model, getattr(lm, "model", None), lm.get_decoder() if hasattr(lm, "get_decoder") else None)
    return list(dict.fromkeys(names[id(module)] for module in candidates if id(module) in names))


def _observed(lm: Any, trunk: nn.Module, head: nn.Linear) -> LogitRule | None:
    # Numbers that bf16 has too: Mamba converts hidden states to the head's type, which must change nothing here.
    line = torch.linspace(-2.0, 2.0, _POSITIONS * head.in_features).to(torch.bfloat16).float()
    hidden_1TE = line.reshape(1, _POSITIONS, -1)
    # From values that no cap bends to values that every cap flattens.
    size_V = torch.logspace(-3, 6, head.out_features)
    sign_V = torch.where(torch.arange(head.out_features) % 2 == 0, 1.0, -1.0)
    product_1TV = (size_V * sign_V).expand(1, _POSITIONS, -1).clone()
    given: list[Tensor] = []
    try:
        with _replaced(trunk, hidden_1TE), _answering(head, product_1TV, given), in_double(), torch.no_grad():
            output = lm(input_ids=torch.zeros(1, _POSITIONS, dtype=torch.long), use_cache=False)
    except Exception as error:  # any: the model's own forward is the answer then, and it is right
        raise_mistakes(error)
        return None
    logits_1TV = getattr(output, "logits", None)
    if len(given) != 1 or logits_1TV is None or logits_1TV.is_meta or logits_1TV.shape != product_1TV.shape:
        return None
    hidden_scale = _factor(given[0], hidden_1TE)
    rule = _read(product_1TV.double(), logits_1TV.double())
    return None if rule is None or hidden_scale is None else replace(rule, hidden_scale=hidden_scale)


def _factor(actual: Tensor, given: Tensor) -> float | None:
    if actual.is_meta or actual.shape != given.shape:  # a layer of the model stands in between
        return None
    factor = float((actual.double() * given.double()).sum() / given.double().square().sum())
    same = torch.allclose(actual.double(), factor * given.double(), rtol=_RTOL, atol=0)
    if not same:
        return None
    return 1.0 if abs(factor - 1) < 1e-9 else factor


def _read(product: Tensor, logits: Tensor) -> LogitRule | None:
    small = product.abs() < 2e-3
    slope = float((logits[small] / product[small]).mean())
    rounded = float(torch.tensor(slope, dtype=torch.float32))
    slope = 1.0 if abs(slope - 1) < 1e-6 else rounded
    if torch.allclose(logits, slope * product, rtol=_RTOL, atol=0):
        return LogitRule(scale=slope)
    cap = float(logits.abs().max())
    if torch.allclose(logits, cap * torch.tanh(slope * product / cap), rtol=_RTOL, atol=0):
        return LogitRule(scale=slope, cap=cap)
    return None


@contextlib.contextmanager
def _replaced(trunk: nn.Module, hidden_1TE: Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        """What any trunk returns, as far as heads ask: everything beside the hidden state is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    output = Output(last_hidden_state=hidden_1TE)  # type: ignore[arg-type]
    with _own_forward(trunk, lambda *args, **kwargs: output):
        yield


@contextlib.contextmanager
def _answering(head: nn.Module, product_1TV: Tensor, given: list[Tensor]) -> Iterator[None]:
    def forward(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return product_1TV

    with _own_forward(head, forward):
        yield


@contextlib.contextmanager
def _own_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
