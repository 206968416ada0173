"""Every storage that operations make, from its making to its end: what exists at one time, and what autograd keeps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Run:
    """One model's figures; every one of them grows by the same amount with each further block."""

    saved: int
    head: int
    peaks: tuple[int, ...]
    """Most in each phase of the blocks, in order: in their forward, in their backward, and after that, where the
    embedding's gradient does not grow with the tokens. With a critic there are phases for both rows."""
    between: int
    """Most between the backward passes of a critic's blocks and the policy's: the policy's head; 0 without a critic."""
    evaluation_head: int
    evaluation_block: int
    traffic: int
    kernels: int
    saved_tensors: int

    @property
    def block(self) -> int:
        """Most outside the head."""
        return max(self.peaks)


PHASES: tuple[str, ...] = ("blocks", "head", "backward", "root")
WITH_CRITIC: tuple[str, ...] = (
    "blocks",
    "policy_head",
    "critic",
    "head",
    "critic_backward",
    "between",
    "backward",
    "root",
)
"""Phases of a forward of policy, policy's head and critic, and of its backward; "head" is the critic's, and the loss.
Of each the most is told apart: with more blocks each grows by a step of its own."""


@dataclass
class Event:
    """A storage that is made or freed, or the start of a phase (serial 0)."""

    phase: str
    serial: int
    change: int


class Storages(TorchDispatchMode):
    """Follows every storage that operations make, until it is freed."""

    def __init__(self, uncounted: set[int], phases: tuple[str, ...] = PHASES) -> None:
        super().__init__()
        self._phases = phases
        self._uncounted = uncounted
        self._alive: dict[int, tuple[int, int]] = {}
        self._events: list[Event] = []
        self._phase = "blocks"
        self._serial = 0
        self._live = 0
        self.most: dict[str, int] = dict.fromkeys(phases, 0)
        self._saved: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take note of what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._uncounted:
            return
        self._serial += 1
        self._alive[key] = (self._serial, storage.nbytes())
        self._change(self._serial, storage.nbytes())
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        serial, size = self._alive.pop(key)
        self._change(serial, -size)

    def _change(self, serial: int, change: int) -> None:
        self._events.append(Event(self._phase, serial, change))
        self._live += change
        self.most[self._phase] = max(self.most[self._phase], self._live)

    def serial(self, tensor: Tensor) -> int:
        """Return the number of a living storage that operations made."""
        return self._alive[key_of(tensor)][0]

    def note(self, phase: str) -> None:
        """Begin a phase. Recomputation passes the marks again: a phase starts once, in order."""
        if self._phases.index(phase) == self._phases.index(self._phase) + 1:
            self._phase = phase
            self._events.append(Event(phase, 0, 0))

    def saved(self) -> Any:
        """Count tensors that autograd saves, inside the context, parameters and inputs left out."""

        def pack(tensor: Tensor) -> Tensor:
            if key_of(tensor) not in self._uncounted:
                self._follow(tensor)
                serial, size = self._alive[key_of(tensor)]
                self._saved[serial] = size
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def summary(self, gradients: set[int], *, evaluation: dict[str, int]) -> Run:
        """Return the peaks by phase, without the storages that end as gradients of parameters."""
        live = traffic = kernels = 0
        most: dict[str, int] = dict.fromkeys(self._phases, 0)
        saved = 0
        for event in self._events:
            if event.serial == 0 and event.phase == "head":
                saved = live
            if event.serial in gradients:
                continue
            live += event.change
            kernels += event.change > 0
            traffic += max(0, event.change)
            most[event.phase] = max(most[event.phase], live)
        return Run(
            saved=saved,
            head=most["head"],
            peaks=tuple(most[phase] for phase in self._phases if phase not in ("head", "between")),
            between=most.get("between", 0),
            evaluation_head=evaluation["head"],
            evaluation_block=evaluation["blocks"],
            traffic=traffic,
            kernels=kernels,
            saved_tensors=sum(self._saved.values()),
        )


def key_of(tensor: Tensor) -> int:
    """Return what tells the tensor's storage from others while it lives."""
    return tensor.untyped_storage()._cdata
