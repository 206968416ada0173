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
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distft.core.errors import DistftError, MachineError
from distft.model import activation_checkpointing
from distft.model.causal import CausalLM
from distft.model.cross_entropy import GATHERED_CHUNKS, HeadLoss, chunk_tokens, chunked_loss, chunked_sum, full_loss
from distft.model.heads import head_of
from distft.model.load import MetaModel
from distft.plan import kernels as stand_ins
from distft.plan.inventory import Inventory
from distft.plan.storages import Run, Storages, key_of
from distft.plan.trace_marks import marked, phases, skipped


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one rank, beside parameters and their gradients."""

    saved: int
    """Kept by the blocks for the backward pass: at the end of the last block's forward."""
    saved_per_block: int
    """The part of `saved` that one more block adds."""
    head: int
    """Most that exists beyond `saved` between the last block's forward and its backward: logits, their gradients; with
    a critic, whose blocks are the last, its values."""
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
    peaks: tuple[int, ...]
    """Most that exists in each phase of the blocks (`Run.peaks`): `block` is the largest beyond `saved`."""
    between: int
    """Most that exists between the backward passes of a critic's blocks and of the policy's, where the policy's head
    has its own; 0 without a critic."""
    saved_tensors: int
    """What autograd's saved-tensor hooks see, each storage once: `saved` and what the head keeps."""

    @property
    def evaluation(self) -> int:
        """Most that exists in a forward without gradients."""
        return max(self.evaluation_head, self.evaluation_block)


def activations(inventory: Inventory, *, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss) -> Activations:
    """Trace a micro-batch of `tokens` and return its figures.

    `kernel`: what attends (see `distft.plan.kernels`). `loss`: what the head runs (see
    `distft.model.cross_entropy`).

    Blocks that compute token by token, as reference scans of state-space models do, launch so many operations that a
    long micro-batch takes minutes to trace. Every size in them is a polynomial of the tokens, of the second degree at
    most, and is read off the one through three short micro-batches; the head is traced by itself at full length.
    """
    how = (checkpointing, kernel, loss)
    step = None if _has_window(inventory, tokens) else _loop_step(inventory, kernel, min(tokens, _LOOKS_AT))
    if step is None or tokens <= _FIRST_OF_DIRECT * step:
        return _by_chunks(inventory, tokens, *how)
    counts = (step, 2 * step, 3 * step)
    whole = [_by_chunks(inventory, count, *how) for count in counts]
    heads = [_by_chunks(inventory, count, "off", kernel, loss, blocks=False) for count in counts]
    head = _by_chunks(inventory, tokens, "off", kernel, loss, blocks=False)

    def of_blocks(name: str) -> int:
        return round(_through([getattr(traced, name) for traced in whole], tokens / step))

    def of_both(name: str) -> int:
        blocks = [
            getattr(traced, name) - getattr(head_alone, name) for traced, head_alone in zip(whole, heads, strict=True)
        ]
        return round(_through(blocks, tokens / step)) + getattr(head, name)

    by_phase = zip(*(traced.peaks for traced in whole), strict=True)
    peaks = tuple(round(_through(list(values), tokens / step)) for values in by_phase)
    return Activations(
        saved=of_blocks("saved"),
        saved_per_block=of_blocks("saved_per_block"),
        head=of_both("head"),
        block=max(0, max(peaks) - of_blocks("saved")),
        peaks=peaks,
        between=of_both("between"),
        evaluation_head=of_both("evaluation_head"),
        evaluation_block=of_blocks("evaluation_block"),
        traffic=of_both("traffic"),
        kernels=of_both("kernels"),
        saved_tensors=of_both("saved_tensors"),
    )


_LOOP_STEPS = (16, 64, 256)
"""Lengths of which some is a multiple of whatever a scan does at a time: a token, or a chunk."""
_LOOKS_AT = 3 * _LOOP_STEPS[-1]
_FIRST_OF_DIRECT = 12
"""Steps up to which a micro-batch is traced as it is."""


def _through(values: list[int], x: float) -> float:
    """Return the value at `x` of the polynomial of second degree through (1, a), (2, b) and (3, c)."""
    first, second, third = values
    return first + (second - first) * (x - 1) + (third - 2 * second + first) * (x - 1) * (x - 2) / 2


@functools.lru_cache(maxsize=64)
def _loop_step(inventory: Inventory, kernel: str, longest: int) -> int | None:
    """Return the tokens that a loop over the sequence does at a time; None when nothing loops, or by another step.

    No more than `longest` tokens are looked at: a model has positions for no more.
    """
    if longest <= _FIRST_OF_DIRECT * _LOOP_STEPS[0]:
        return None

    def ran(tokens: int) -> int:
        return _operations(inventory.samples[0], tokens, kernel)

    if ran(_LOOP_STEPS[0]) == ran(min(longest, 2 * _LOOP_STEPS[-1])):
        return None
    for step in (candidate for candidate in _LOOP_STEPS if 3 * candidate <= longest):
        counts = [ran(times * step) for times in (1, 2, 3)]
        growth = {more - fewer for fewer, more in itertools.pairwise(counts)}
        if len(growth) == 1 and growth.pop() > 0:
            return step
    return None


def _operations(sample: MetaModel, tokens: int, kernel: str) -> int:
    """Return the operations of a forward without gradients; 0 where it does not run, which `_run` then says."""
    seen = _Operations()
    try:
        with _ready(sample.module, "off", kernel, full_loss), seen, torch.no_grad():
            sample.module(**_batch(sample.module, tokens))
    except Exception:  # any, see `_run`
        return 0
    return seen.count


class _Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def _has_window(inventory: Inventory, tokens: int) -> bool:
    """Return whether some layer attends to less than `tokens`: short micro-batches then do not stand for long."""
    text = inventory.config.get_text_config(decoder=True)
    limits = [value for name, value in vars(text).items() if "window" in name or "attention_chunk" in name]
    return any(isinstance(limit, int) and not isinstance(limit, bool) and 0 < limit < tokens for limit in limits)


def _by_chunks(
    inventory: Inventory, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss, *, blocks: bool = True
) -> Activations:
    """Under the chunked losses every size is a constant and a part that grows with the tokens, from the third chunk on
    (what is written: with every GATHERED_CHUNKS); a long micro-batch, whose hundreds of chunks take seconds to trace,
    is read off the line through two short ones.
    """  # noqa: D205
    how = (checkpointing, kernel, loss, blocks)
    scores = (head := head_of(inventory.samples[0].module.transformer)) is not None and not head.generates
    if inventory.path.head == "own" or scores or loss not in (chunked_loss, chunked_sum):
        return _traced(inventory, tokens, *how)
    chunk = chunk_tokens(inventory.samples[0].module.head.weight.shape[0])
    step = GATHERED_CHUNKS * chunk
    if tokens <= 2 * step:
        return _traced(inventory, tokens, *how)
    near, far = (_traced(inventory, count * step, *how) for count in (1, 2))
    beyond = (tokens - 2 * step) / step

    def drawn(there: int, before: int) -> int:
        return round(there + beyond * (there - before))

    line = {name: drawn(there, vars(near)[name]) for name, there in vars(far).items() if name != "peaks"}
    peaks = tuple(drawn(*pair) for pair in zip(far.peaks, near.peaks, strict=True))
    line["block"] = max(0, max(peaks) - line["saved"])
    return Activations(peaks=peaks, **line)


@functools.lru_cache(maxsize=512)
def _traced(
    inventory: Inventory, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss, blocks: bool = True
) -> Activations:
    """Trace a micro-batch; `blocks=False`: without what happens in them, for the head alone."""
    runs = [
        _run(
            sample,
            tokens=tokens,
            checkpointing=checkpointing,
            kernel=kernel,
            loss=loss,
            evaluate=sample is inventory.samples[-1],
            blocks=blocks,
        )
        for sample in inventory.samples
    ]
    first, last = runs[0], runs[-1]

    def repeated(there: int, before: int) -> int:
        return there if len(runs) == 1 else there + (there - before) * (inventory.num_blocks - inventory.depths[-1])

    def whole(name: str) -> int:
        return repeated(getattr(last, name), getattr(first, name))

    saved = whole("saved")
    peaks = tuple(map(repeated, last.peaks, first.peaks))
    return Activations(
        saved=saved,
        saved_per_block=last.saved - first.saved if len(runs) > 1 else last.saved // inventory.num_blocks,
        head=max(0, whole("head") - saved),
        block=max(0, max(peaks) - saved),
        peaks=peaks,
        between=whole("between"),
        evaluation_head=last.evaluation_head,  # nothing is kept for a backward pass, so depth does not matter
        evaluation_block=last.evaluation_block,
        traffic=whole("traffic"),
        kernels=whole("kernels"),
        saved_tensors=whole("saved_tensors"),
    )


def _batch(module: CausalLM, tokens: int) -> dict[str, Any]:
    """Build one document as the forward takes it; every token supervised, or a scalar head's last one scored."""
    ids = torch.zeros(tokens, dtype=torch.long, device="meta")
    bounds = torch.tensor([0, tokens], dtype=torch.int32)  # router losses read them
    batch = {"input_ids_T": ids, "position_ids_T": ids, "cu_seqlens": bounds, "max_seqlen": tokens}
    if (head := head_of(module.transformer)) is not None and not head.generates:
        return batch | {"ends_D": torch.zeros(1, dtype=torch.long, device="meta")}
    return batch | {"labels_T": ids, "num_supervised": tokens}


def _run(
    sample: MetaModel, *, tokens: int, checkpointing: str, kernel: str, loss: HeadLoss, evaluate: bool, blocks: bool
) -> Run:
    try:
        return _followed(sample, tokens, checkpointing, kernel, loss, evaluate, blocks)
    except DistftError:
        raise
    except Exception as error:  # any: a forward that looks at values, of which meta has none, or at more than it knows
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        kind = type(sample.module.transformer).__name__
        raise MachineError(
            f"{kind} cannot be planned: its forward does not run without numbers ({reason})  "
            "set [train] micro_batch_size and activation_checkpointing yourself; distft bench measures what they need"
        ) from error


def _followed(
    sample: MetaModel,
    tokens: int,
    checkpointing: str,
    kernel: str,
    loss: HeadLoss,
    evaluate: bool,
    blocks: bool,
) -> Run:
    module = sample.module
    left_out = contextlib.nullcontext() if blocks else skipped(sample.blocks, _block_output(sample, kernel))
    with _ready(module, checkpointing, kernel, loss), left_out:
        batch = _batch(module, tokens)
        inputs = [value for value in batch.values() if isinstance(value, Tensor)]
        uncounted = {key_of(tensor) for tensor in [*module.parameters(), *module.buffers(), *inputs]}
        looked = Storages(uncounted)
        if evaluate:
            with looked, torch.no_grad(), marked(sample.rows[:1], looked):
                module(**batch)
        with Storages(uncounted, phases(sample.rows)) as seen, seen.saved():
            with marked(sample.rows, seen):
                losses = module(**batch, **({} if module.critic is None else {"per_token": True, "values": True}))
                total = losses.sum() if isinstance(losses, Tensor) else sum(part.sum() for part in losses)
                total.backward()  # type: ignore[union-attr]
            gradients = {seen.serial(param.grad) for param in module.parameters() if param.grad is not None}
        del losses, total
        for param in module.parameters():
            param.grad = None
    return seen.summary(gradients, evaluation=looked.most)


@contextlib.contextmanager
def _ready(module: CausalLM, checkpointing: str, kernel: str, loss: HeadLoss) -> Iterator[None]:
    """Set the module up as the job would, on meta, for one trace."""
    stand_ins.register()
    configs = [
        config for model in module.pretrained for config in (model.config, model.config.get_text_config(decoder=True))
    ]
    before = [config._attn_implementation for config in configs]
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    for config in configs:
        config._attn_implementation = stand_ins.registered(kernel)
    for part, held in buffers:
        part._buffers = {name: None if value is None else value.to("meta") for name, value in held.items()}
    module.use_loss(loss)
    module.train()
    with warnings.catch_warnings():  # transformers renames the switch; both names work in what we support
        warnings.simplefilter("ignore", FutureWarning)
        for model in module.pretrained:
            activation_checkpointing.checkpoint_blocks(model, checkpointing)  # type: ignore[arg-type]
    try:
        with stand_ins.standing_in(kernel, packed=module.path.documents == "packed"):
            yield
    finally:
        if checkpointing != "off":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                for model in module.pretrained:
                    model.gradient_checkpointing_disable()
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for part, held in buffers:
            part._buffers = held


def _block_output(sample: MetaModel, kernel: str) -> Any:
    """Return what the policy's last block returns for a few tokens."""
    outputs: list[Any] = []
    hook = sample.rows[0][-1].register_forward_hook(lambda block, given, output: outputs.append(output))
    try:
        _operations(sample, 8, kernel)
    finally:
        hook.remove()
    return outputs[-1]
