"""AdaLoRA's allocation of ranks, as an optimizer around another one: importances are state of the tensors.

So they are saved, continued and planned as moments are. After an update every number of A, B and E has its importance
smoothed; between `tinit` and the end less `tfinal`, triplets (a row of A, a column of B, a number of E) with the least
are masked until the budget is kept, and from then on stay masked.

R rank, I inputs, O outputs: A [R, I], B [O, R], E [R, 1].
Sources: https://arxiv.org/abs/2303.10512; peft/tuners/adalora/layer.py (RankAllocator)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMPORTANCE, UNCERTAINTY, MASKED = "importance", "uncertainty", "masked"
"""Keys of the state: smoothed |weight x gradient|, how much that varies, and of E which numbers stay zero."""


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """When how many triplets are kept; PEFT's names."""

    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    total: int
    """Updates of the run."""

    def budget(self, step: int, layers: int) -> int | None:
        """Return how many triplets of all layers are kept after an update, counted from 1; None: nothing is masked."""
        first, last = self.init_r * layers, self.target_r * layers
        end = self.total - self.tfinal
        if step <= self.tinit or step > end or (step < end and step % self.delta_t):
            return None
        rest = 1 - (step - self.tinit) / (end - self.tinit)
        return int((first - last) * rest**3 + last)


class RankAllocator(torch.optim.Optimizer):
    """Steps an optimizer, then allocates ranks; both have the groups and the state of this one."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: RankSchedule,
        betas: tuple[float, float],
    ) -> None:
        """`groups`: with the `names` of their tensors."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._inner = make(self.param_groups)
        self.state = self._inner.state
        if (coded := getattr(self._inner, "coded", None)) is not None:
            self.coded = coded  # how its moments are read (`distft.engine.fragments`)
        self._schedule, self._betas = schedule, betas
        named = {name: param for group in groups for name, param in zip(group["names"], group["params"], strict=True)}
        self._named = {name: param for name, param in named.items() if ".lora_" in name}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every tensor, and what is known of its importance; then mask what the budget leaves no room for."""
        assert closure is None, "the loop computes the loss"
        self._inner.step()
        step = max(int(self.state[param]["step"]) for param in self._named.values())
        with torch.no_grad():
            for name, param in self._named.items():
                self._weigh(name, param, counts=step < self._schedule.total - self._schedule.tfinal)
            values = {name: param for name, param in self._named.items() if ".lora_E." in name}
            budget = self._schedule.budget(step, len(values))
            if budget is not None:
                self._mask(values, budget)
            elif step > self._schedule.total - self._schedule.tfinal:
                for param in values.values():
                    param.masked_fill_(self.state[param][MASKED].bool(), 0.0)

    def _weigh(self, name: str, param: Tensor, *, counts: bool) -> None:
        state = self.state[param]
        if IMPORTANCE not in state:
            state[IMPORTANCE], state[UNCERTAINTY] = torch.zeros_like(param), torch.zeros_like(param)
            if ".lora_E." in name:
                state[MASKED] = torch.zeros_like(param)
        if not counts or param.grad is None:
            return
        beta1, beta2 = self._betas
        importance = (param * param.grad).abs()
        state[IMPORTANCE].mul_(beta1).add_(importance, alpha=1 - beta1)
        state[UNCERTAINTY].mul_(beta2).add_((importance - state[IMPORTANCE]).abs(), alpha=1 - beta2)

    def _mask(self, values: dict[str, Tensor], budget: int) -> None:
        scores = {name: self._of_triplets(name) for name in values}
        masked = sum(len(score) for score in scores.values()) - budget
        if masked < 1:
            return
        threshold = torch.kthvalue(torch.cat(list(scores.values())), masked)[0]
        for name, param in values.items():
            drop = (scores[name] <= threshold)[:, None]
            param.masked_fill_(drop, 0.0)
            self.state[param][MASKED].copy_(drop)

    def _of_triplets(self, name: str) -> Tensor:
        """Return the score of each triplet of a layer, [R]."""
        value, row, column = (self._score(name.replace(".lora_E.", f".lora_{part}.")) for part in "EAB")
        return value.view(-1) + row.mean(1) + column.mean(0)

    def _score(self, name: str) -> Tensor:
        state = self.state[self._named[name]]
        return state[IMPORTANCE] * state[UNCERTAINTY]
