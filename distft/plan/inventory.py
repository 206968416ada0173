"""Every parameter of a run as numbers: the model of a recipe, built on the meta device from its config alone.

A model of 80 equal blocks is built with two and three of them and repeated on paper: building PEFT layers takes
longer than everything else a plan does. Models whose blocks differ are built whole.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distft.engine.footprint import ROOT
from distft.model import experts, load, quantize, stats
from distft.model.adapters import MethodSpec, targets
from distft.model.blocks import blocks_of
from distft.model.heads import HEADS
from distft.model.paths import VARLEN, ForwardPath
from distft.recipe.schema import ModelTable

if TYPE_CHECKING:
    from distft.model.load import MetaModel

BLOCK_4BIT = 64
"""Weights that share one constant (bitsandbytes' blocksize)."""
BLOCK_CONSTANTS = 256
"""Constants that share one constant, under double quantisation."""
CODE_4BIT_BYTES = 16 * 4
"""fp32 values that 4-bit codes stand for; bitsandbytes keeps one copy a layer."""
CODE_8BIT_BYTES = 256 * 4
"""The same for 8-bit constants under double quantisation."""
OFFSET_BYTES = 4
"""Mean of the constants, subtracted before they are quantised."""


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter, by the sizes that engines and optimizers look at."""

    name: str
    shape: tuple[int, ...]
    """The shape as the module has it; a 4-bit one as the linear layer means it."""
    item_bytes: int
    """Bytes of one stored element."""
    trained: bool
    decayed: bool
    """Has weight decay, so it is in the optimizer's first group."""
    block: int
    """Index of its transformer block, or ROOT; block k of a critic is `Inventory.num_blocks` + k."""
    faster: bool = False
    """Has a learning rate of its own, so it is in another group of the optimizer."""
    double: bool | None = None
    """Stored in 4 bits, with (True) or without double quantisation; None: stored as it is."""

    @property
    def numel(self) -> int:
        """Elements that the model means."""
        return int(torch.Size(self.shape).numel())

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds it: 4-bit weights are packed two to a byte into one column."""
        if self.double is None:
            return self.shape
        return (-(-((self.numel + 1) // 2) // self.item_bytes), 1)

    @property
    def stored_numel(self) -> int:
        """Elements of the tensor that holds it."""
        return int(torch.Size(self.stored_shape).numel())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor that holds it, whole."""
        return self.stored_numel * self.item_bytes

    @property
    def constants_bytes(self) -> int:
        """What belongs to a 4-bit weight beside its packed values.

        Source: bitsandbytes.functional.quantize_4bit, quantize_blockwise.
        """
        if self.double is None:
            return 0
        blocks = -(-self.numel // BLOCK_4BIT)
        if not self.double:
            return 4 * blocks + CODE_4BIT_BYTES
        return blocks + 4 * -(-blocks // BLOCK_CONSTANTS) + OFFSET_BYTES + CODE_4BIT_BYTES + CODE_8BIT_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """A model as one recipe trains it. Equal only to itself: traces are remembered by it."""

    params: tuple[Param, ...]
    """Parameters in the module's order, each tied tensor once."""
    num_blocks: int
    """Of the policy; a critic has as many."""
    samples: tuple[MetaModel, ...]
    """Models to trace, without quantisation: of two blocks and of three, from which any number follows; or one of all
    blocks. A critic's are as many."""
    depths: tuple[int, ...]
    """Blocks of each sample."""
    config: Any
    """Transformers' config of the whole model."""
    dtype: torch.dtype
    atomic: bool
    """ZeRO-3 gathers whole blocks (see `core.types.Weights.blocks_are_atomic`)."""
    linears: tuple[tuple[int, bool], ...]
    """(weights, trained) of each linear layer of the policy: what takes part in matrix products."""
    path: ForwardPath
    """How the model's numbers are computed."""
    own_buffers: int = 0
    """Bytes of the method's buffers, such as VeRA's random matrices, which every rank has whole."""
    rows: int = 1
    """Rows of equal blocks: the policy's, and a critic's."""
    critic_linears: tuple[tuple[int, bool], ...] = ()
    """Those of a critic that is a model of its own."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one element in the type that the model computes in."""
        return self.dtype.itemsize

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(param.numel for param in self.params)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(param.numel for param in self.params if param.trained)

    @property
    def largest_4bit(self) -> int:
        """Weights of the largest layer that is stored in 4 bits; 0 without any."""
        return max((param.numel for param in self.params if param.double is not None), default=0)

    @property
    def has_critic(self) -> bool:
        """Whether a critic that is a model of its own stands beside the policy."""
        return self.rows > 1

    @property
    def policy(self) -> Inventory:
        """Return the same without the critic: what forwards without values read."""
        policy = tuple(param for param in self.params if param.name.startswith(load.WRAPPER))
        return replace(self, params=policy, rows=1, critic_linears=())

    @property
    def policy_share(self) -> float:
        """Return the policy's part of the matrix products of a forward with values."""
        ours, theirs = (sum(numel for numel, _ in linears) for linears in (self.linears, self.critic_linears))
        return ours / (ours + theirs)

    def unit_numel(self, block: int, *, trained_only: bool = False) -> int:
        """Return the stored elements of one block, or of ROOT."""
        held = (p for p in self.params if p.block == block and (p.trained or not trained_only))
        return sum(param.stored_numel for param in held)


def read(
    table: ModelTable,
    folder: Path,
    method: MethodSpec,
    params: Any,
    *,
    path: ForwardPath | None = None,
    head: str = "lm",
) -> Inventory:
    """Read the model that `table` and `method` describe; `folder` needs only a config.json.

    `path`: the proven one (see `distft.model.proving`); None: the one of a model that needs no fall-back. `head`: name
    of what stands on its hidden states.

    Raises:
        RecipeError: the config is not one that transformers knows.
    """
    config = load.read_config(folder)
    num_blocks = config.get_text_config(decoder=True).num_hidden_layers
    differ = targets.name_blocks(params) or method.blocks_differ(params)
    alike = num_blocks > 3 and not differ and _blocks_are_equal(config)
    depths = (2, 3) if alike else (num_blocks,)
    # 4-bit layers save for the backward pass what plain frozen ones save, and cannot run on meta.
    plain = replace(method, quant=lambda _: None)
    samples = [_build(table, folder, plain, params, _shortened(config, depth), path, head) for depth in depths]
    deepest = samples[-1]
    if method.quant(params) is not None:
        for sample in samples:
            for _, module, short in experts.all_expert_tensors(sample.module.lm):
                # Experts in 4 bits compute with a copy in the model's dtype, which the backward pass needs too.
                experts.compute_with(module, short, torch.clone, first=True)
        deepest = _build(table, folder, method, params, _shortened(config, depths[-1]), path, head)
    linears, critic_linears = _linears(deepest, num_blocks - depths[-1])
    return Inventory(
        params=tuple(
            _repeated(
                list(_listed(deepest, method.faster if method.lr_ratio(params) != 1.0 else None)),
                num_blocks - depths[-1],
                len(deepest.rows),
            )
        ),
        num_blocks=num_blocks,
        samples=tuple(samples),
        depths=depths,
        config=config,
        dtype=deepest.dtype,
        atomic=deepest.blocks_are_atomic,
        linears=linears,
        path=path or _unproven(table, deepest),
        own_buffers=_own_buffers(samples, depths, num_blocks, method),
        rows=len(deepest.rows),
        critic_linears=critic_linears,
    )


def _own_buffers(samples: list[MetaModel], depths: tuple[int, ...], num_blocks: int, method: MethodSpec) -> int:
    """Return the bytes of buffers that belong to the method, those that layers share once."""
    sizes = []
    for sample in samples:
        own = {id(buffer): buffer for name, buffer in sample.module.lm.named_buffers() if method.owns(name)}
        sizes.append(sum(buffer.numel() * buffer.element_size() for buffer in own.values()))
    return sizes[-1] + (sizes[-1] - sizes[0]) * (num_blocks - depths[-1])


def _unproven(table: ModelTable, built: MetaModel) -> ForwardPath:
    """Return the path of a model that takes none of the fall-backs."""
    attention = table.attention if table.attention in ("sdpa", "eager") else VARLEN
    return ForwardPath(head=built.module.path.head, attention=attention)


def resized(inventory: Inventory, num_blocks: int) -> Inventory:
    """Return the same architecture with another number of equal blocks.

    Raises:
        ValueError: its blocks differ, or that is fewer than were built.
    """
    built = inventory.depths[-1]
    if len(inventory.depths) == 1 or num_blocks < built:
        raise ValueError(f"a model of {inventory.num_blocks} blocks cannot be resized to {num_blocks}")
    base: list[Param] = []
    for param in inventory.params:
        row, place = divmod(param.block, inventory.num_blocks)
        if param.block == ROOT:
            base.append(param)
        elif place < built:
            base.append(replace(param, block=row * built + place))
    linears, critic_linears = _linears(inventory.samples[-1], num_blocks - built)
    return replace(
        inventory,
        params=tuple(_repeated(base, num_blocks - built, inventory.rows)),
        num_blocks=num_blocks,
        linears=linears,
        critic_linears=critic_linears,
    )


def _build(
    table: ModelTable, folder: Path, method: MethodSpec, params: Any, config: Any, path: ForwardPath | None, head: str
) -> MetaModel:
    if method.adapter:
        _import_bitsandbytes()
    # Kernels are chosen where the run is, not where the plan is made: `trace` puts its own in.
    plain = table.model_copy(update={"attention": "eager", "cross_entropy": "full"})
    cpu = torch.device("cpu")
    if path is not None and path.attention.startswith("flash_attention_"):
        path = replace(path, attention=VARLEN)  # a name that needs no package
    given: dict[str, Any] = {"seed": 0, "device": cpu, "weights": False, "path": path, "head": HEADS[head]}
    return load.build(plain, folder, method, params, config=config, **given)


def _import_bitsandbytes() -> None:
    """Import what PEFT imports too, without the compiler.

    bitsandbytes wraps functions in torch.compile, of which a plan runs none, and so imports inductor: 2 s, as long as
    the rest of a plan takes. To be deleted when a version later than 0.50.2 no longer does.
    """
    if importlib.util.find_spec("bitsandbytes") is None or "bitsandbytes" in sys.modules:
        return
    compiles = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiles


def _uncompiled(model: Any = None, **options: Any) -> Any:
    """Stand for torch.compile, as a call or with options as a decorator: they say only how to compile."""
    return model if model is not None else lambda function: function


def _shortened(config: Any, depth: int) -> Any:
    """Return the same model with `depth` blocks; lists with an entry for each block are cut too."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    return shorter


def _blocks_are_equal(config: Any) -> bool:
    """Return whether every block has the same class and parameters; the whole model, on meta, takes milliseconds."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    signatures = {
        (type(block).__name__, tuple((name, param.shape) for name, param in block.named_parameters()))
        for block in blocks_of(lm)
    }
    return len(signatures) == 1


def _listed(built: MetaModel, faster: Callable[[str], bool] | None) -> Iterator[Param]:
    of_block = {id(param): index for index, block in enumerate(built.blocks) for param in block.parameters()}
    stored = {id(param): how for module in built.module.modules() for param, how in quantize.stored_in_4bit(module)}
    for name, param in built.module.named_parameters():
        how = stored.get(id(param))
        yield Param(
            name=name,
            shape=tuple(param.shape) if how is None else how.shape,
            item_bytes=(param.dtype if how is None else how.storage).itemsize,
            trained=param.requires_grad,
            decayed=param.ndim >= 2,
            faster=faster is not None and param.requires_grad and faster(name),
            block=of_block.get(id(param), ROOT),
            double=None if how is None else how.double,
        )


def _linears(built: MetaModel, extra: int) -> tuple[tuple[tuple[int, bool], ...], tuple[tuple[int, bool], ...]]:
    """Return (weights, trained) of each matrix that `flops_per_token` counts: the policy's, and a critic's.

    Those of the last block of each row are there `extra` more times.
    """
    repeated = {id(module) for row in built.rows for module in row[-1].modules()}
    whole, found = built.module, (list[tuple[int, bool]](), list[tuple[int, bool]]())
    of_critic = {id(whole.value_head)} if whole.critic is not None else set[int]()
    of_critic |= {id(module) for module in whole.critic.modules()} if whole.critic is not None else set()
    for module in whole.modules():
        for layer in stats.of_module(module, whole):
            found[id(module) in of_critic].extend((layer,) * (1 + extra if id(module) in repeated else 1))
    return tuple(found[0]), tuple(found[1])


def _repeated(params: list[Param], extra: int, rows: int) -> Iterator[Param]:
    """Yield `params` with the last block of each of `rows` repeated `extra` more times, in the module's order."""
    depth = (max(param.block for param in params) + 1) // rows

    def numbered(param: Param) -> Param:
        row, place = divmod(param.block, depth)
        return param if param.block == ROOT else replace(param, block=row * (depth + extra) + place)

    begin = 0
    for row in range(rows):
        indices = [index for index, param in enumerate(params) if param.block == (row + 1) * depth - 1]
        end = indices[-1] + 1
        yield from map(numbered, params[begin:end])
        for index in range(depth, depth + extra):
            for param in params[indices[0] : end]:
                name = re.sub(rf"\.{depth - 1}\.", f".{index}.", param.name, count=1)
                yield replace(param, block=row * (depth + extra) + index, name=name)
        begin = end
    yield from map(numbered, params[begin:])
