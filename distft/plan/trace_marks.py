"""Where a traced forward and backward pass from phase to phase, and blocks that are left out of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distft.plan.storages import PHASES, WITH_CRITIC, Storages


def phases(rows: list[list[nn.Module]]) -> tuple[str, ...]:
    """Return the phases of a forward through these rows of blocks and of its backward."""
    return PHASES if len(rows) == 1 else WITH_CRITIC


@contextlib.contextmanager
def skipped(blocks: list[nn.Module], output: Any) -> Iterator[None]:
    """Let blocks return their input, multiplied by something trained, in the form of `output`."""
    factor = torch.ones((), device="meta", requires_grad=True)

    def forward(hidden_states: Tensor, *rest: Any, **beside: Any) -> Any:
        """Return the input; whatever else a block is given is for what is skipped here."""
        hidden = hidden_states * factor.to(hidden_states.dtype)
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *[None] * (len(output) - 1)])

    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


@contextlib.contextmanager
def marked(rows: list[list[nn.Module]], seen: Storages) -> Iterator[None]:
    """Note where each row's forward ends and its backward starts, and where the first block's backward ends.

    `rows`: the policy's blocks, and a critic's where the forward runs it.
    """
    policy, *critics = rows
    hooks: list[Any] = []

    def note_end(block: nn.Module, forward: str, backward: str) -> None:
        def ended(_: nn.Module, __: Any, output: Any) -> None:
            seen.note(forward)
            hidden = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if hidden.requires_grad:
                hidden.register_hook(_noting(seen, backward))

        hooks.append(block.register_forward_hook(ended))

    def note_begin(block: nn.Module, forward: str | None, backward: str) -> None:
        def began(_: nn.Module, given: Any, beside: Any) -> None:
            if forward is not None:
                seen.note(forward)
            hidden = next((leaf for leaf in tree_leaves((given, beside)) if isinstance(leaf, Tensor)), None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(_noting(seen, backward))

        hooks.append(block.register_forward_pre_hook(began, with_kwargs=True))

    note_end(policy[-1], "policy_head" if critics else "head", "backward")
    note_begin(policy[0], None, "root")
    for critic in critics:
        note_begin(critic[0], "critic", "between")
        note_end(critic[-1], "head", "critic_backward")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _noting(seen: Storages, phase: str) -> Callable[[Tensor], None]:
    return lambda grad: seen.note(phase)
