"""What one micro-batch really keeps in memory: the model's own forward and backward on the meta device.

Every operation runs as it would, autograd saves what it saves and frees what it frees; only the numbers are missing.
Storages are followed from their making to their end, so what is reported are sizes of real storages, each counted
once however many views of it are saved, and without parameters. Nothing here knows an architecture.

T tokens of the micro-batch, laid end to end as one document; every one of them supervised, which is the most there
can be.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distft.model import savers
from distft.model.causal import CausalLM
from distft.model.cross_entropy import GATHERED_CHUNKS, HeadLoss, chunk_tokens, chunked_loss, chunked_sum
from distft.model.load import MetaModel
from distft.plan import kernels as stand_ins
from distft.plan.inventory import Inventory


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one rank, beside parameters and their gradients."""

    saved: int
    """Kept by the blocks for the backward pass: at the end of the last block's forward."""
    saved_per_block: int
    """The part of `saved` that one more block adds."""
    head: int
    """Most that exists beyond `saved` between the last block's forward and its backward: logits, their gradients."""
    block: int
    """Most that exists beyond `saved` while a block runs: temporaries, and under checkpointing one live block."""
    evaluation_head: int
    """Most that exists while the head runs, in a forward without gradients."""
    evaluation_block: int
    """Most that exists while the blocks run, in a forward without gradients."""
    traffic: int
    """Written by all operations of forward and backward together."""
    kernels: int
    """Operations of forward and backward that make a tensor: about as many kernels are launched."""
    saved_tensors: int
    """What autograd's saved-tensor hooks see, each storage once: `saved` and what the head keeps."""

    @property
    def evaluation(self) -> int:
        """Most that exists in a forward without gradients."""
        return max(self.evaluation_head, self.evaluation_block)


@dataclass(frozen=True)
class _Run:
    """One model's figures; every one of them grows by the same amount with each further block."""

    saved: int
    head: int
    block: int
    evaluation_head: int
    evaluation_block: int
    traffic: int
    kernels: int
    saved_tensors: int


def activations(inventory: Inventory, *, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss) -> Activations:
    """Figures of a micro-batch of `tokens`.

    `kernel`: what attends, one of `distft.plan.kernels.ATTENTION`. `loss`: what the head runs (see
    `distft.model.cross_entropy`).

    Under the chunked losses every size is a constant and a part that grows with the tokens, from the third chunk on
    (what is written: with every GATHERED_CHUNKS); a long micro-batch, whose hundreds of chunks take seconds to trace,
    is read off the line through two short ones.
    """
    chunk = chunk_tokens(inventory.samples[0].module.head.weight.shape[0])
    step = GATHERED_CHUNKS * chunk
    if loss not in (chunked_loss, chunked_sum) or tokens <= step:
        return _traced(inventory, tokens, checkpointing, kernel, loss)
    near, far = (_traced(inventory, count * step, checkpointing, kernel, loss) for count in (1, 2))
    beyond = (tokens - 2 * step) / step
    return Activations(
        **{name: round(there + beyond * (there - vars(near)[name])) for name, there in vars(far).items()}
    )


@functools.lru_cache(maxsize=512)
def _traced(inventory: Inventory, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss) -> Activations:
    runs = [
        _run(
            sample,
            tokens=tokens,
            checkpointing=checkpointing,
            kernel=kernel,
            loss=loss,
            evaluate=sample is inventory.samples[-1],
        )
        for sample in inventory.samples
    ]
    first, last = runs[0], runs[-1]

    def whole(name: str) -> int:
        if len(runs) == 1:
            return getattr(last, name)
        step = getattr(last, name) - getattr(first, name)
        return getattr(last, name) + step * (inventory.num_blocks - inventory.depths[-1])

    saved = whole("saved")
    return Activations(
        saved=saved,
        saved_per_block=last.saved - first.saved if len(runs) > 1 else last.saved // inventory.num_blocks,
        head=max(0, whole("head") - saved),
        block=max(0, whole("block") - saved),
        evaluation_head=last.evaluation_head,  # nothing is kept for a backward pass, so depth does not matter
        evaluation_block=last.evaluation_block,
        traffic=whole("traffic"),
        kernels=whole("kernels"),
        saved_tensors=whole("saved_tensors"),
    )


def _run(sample: MetaModel, *, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss, evaluate: bool) -> _Run:
    module = sample.module
    with _ready(module, sample.blocks, checkpointing, kernel, loss):
        ids = torch.zeros(tokens, dtype=torch.long, device="meta")
        bounds = torch.zeros(2, dtype=torch.int32, device="meta")
        batch = (ids, ids, ids, bounds, tokens, tokens)
        own = {_key(tensor) for tensor in [*module.parameters(), *module.buffers(), ids, bounds]}
        looked = _Storages(own)
        if evaluate:
            with looked, torch.no_grad(), _marked(sample.blocks[-1], looked):
                module(*batch)
        with _Storages(own) as seen, seen.saved():
            with _marked(sample.blocks[-1], seen):
                losses = module(*batch)
                losses.sum().backward()
            gradients = {seen.serial(param.grad) for param in module.parameters() if param.grad is not None}
        del losses
        for param in module.parameters():
            param.grad = None
    return seen.summary(gradients, evaluation=looked.most)


@contextlib.contextmanager
def _ready(
    module: CausalLM, blocks: list[nn.Module], checkpointing: str, kernel: str, loss: HeadLoss
) -> Iterator[None]:
    """The module as the job would set it up, on meta, for one trace."""
    stand_ins.register()
    transformer = module.transformer
    text = transformer.config.get_text_config(decoder=True)
    before, buffers = text._attn_implementation, [(part, dict(part._buffers)) for part in module.modules()]
    text._attn_implementation = kernel
    for part, held in buffers:
        part._buffers = {name: None if value is None else value.to("meta") for name, value in held.items()}
    module.use_loss(loss)
    module.train()
    with warnings.catch_warnings():  # transformers renames the switch; both names work in what we support
        warnings.simplefilter("ignore", FutureWarning)
        savers.checkpoint_blocks(transformer, checkpointing)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if checkpointing != "off":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                transformer.gradient_checkpointing_disable()
        text._attn_implementation = before
        for part, held in buffers:
            part._buffers = held


@contextlib.contextmanager
def _marked(block: nn.Module, seen: _Storages) -> Iterator[None]:
    """Notes where the last block's forward ends and its backward starts."""

    def ended(_: nn.Module, __: Any, output: Any) -> None:
        seen.note("head")
        hidden = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: seen.note("backward"))

    hook = block.register_forward_hook(ended)
    try:
        yield
    finally:
        hook.remove()


_PHASES: tuple[str, ...] = ("blocks", "head", "backward")


@dataclass
class _Event:
    """A storage that is made or freed, or the start of a phase (serial 0)."""

    phase: str
    serial: int
    change: int


class _Storages(TorchDispatchMode):
    """Follows every storage that operations make, until it is freed."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        self._alive: dict[int, tuple[int, int]] = {}
        self._events: list[_Event] = []
        self._phase = "blocks"
        self._serial = 0
        self._live = 0
        self.most: dict[str, int] = dict.fromkeys(_PHASES, 0)
        self._saved: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and takes note of what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._own:
            return
        self._serial += 1
        self._alive[key] = (self._serial, storage.nbytes())
        self._change(self._serial, storage.nbytes())
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        serial, size = self._alive.pop(key)
        self._change(serial, -size)

    def _change(self, serial: int, change: int) -> None:
        self._events.append(_Event(self._phase, serial, change))
        self._live += change
        self.most[self._phase] = max(self.most[self._phase], self._live)

    def serial(self, tensor: Tensor) -> int:
        """Number of a living storage that operations made."""
        return self._alive[_key(tensor)][0]

    def note(self, phase: str) -> None:
        """What follows belongs to `phase`. Recomputation passes the marks again: a phase starts once, in order."""
        if _PHASES.index(phase) == _PHASES.index(self._phase) + 1:
            self._phase = phase
            self._events.append(_Event(phase, 0, 0))

    def saved(self) -> Any:
        """Context in which tensors that autograd saves are counted, parameters and inputs left out."""

        def pack(tensor: Tensor) -> Tensor:
            if _key(tensor) not in self._own:
                self._follow(tensor)
                serial, size = self._alive[_key(tensor)]
                self._saved[serial] = size
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def summary(self, gradients: set[int], *, evaluation: dict[str, int]) -> _Run:
        """Peaks by phase, without the storages that end as gradients of parameters."""
        live = traffic = kernels = 0
        most: dict[str, int] = dict.fromkeys(_PHASES, 0)
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
        return _Run(
            saved=saved,
            head=most["head"],
            block=max(most["blocks"], most["backward"]),
            evaluation_head=evaluation["head"],
            evaluation_block=evaluation["blocks"],
            traffic=traffic,
            kernels=kernels,
            saved_tensors=sum(self._saved.values()),
        )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
