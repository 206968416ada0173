"""Memory of one rank, by component and by phase of the run.

State is exact (`distft.plan.state`), activations and logits are those of a traced micro-batch (`distft.plan.trace`),
gathered layers and buckets follow from how the engines are set up; what is neither, an allowance, says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from distft.checkpoint.intervals import CHUNK_BYTES
from distft.core.accelerators import GIB
from distft.engine.footprint import FP32, State, gib_text
from distft.model.adapters.spec import optimizer_of
from distft.model.attention_shape import largest_attention
from distft.model.load import WRAPPER
from distft.plan import other_weights
from distft.plan import state as states
from distft.plan.generation_memory import GenerationMemory, generation_memory, rollout_memory
from distft.plan.inventory import Inventory
from distft.plan.kernels import EAGER
from distft.plan.other_weights import OtherWeights
from distft.plan.setup import Setup
from distft.plan.trace import Activations, activations

HOST_PROCESS_BYTES = 3 * GIB
"""Host memory of a process that has imported torch, CUDA and transformers: an allowance."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One figure with its reason."""

    name: str
    num_bytes: int
    formula: str
    """The formula with its numbers in it."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Most bytes on the device while the run loads, takes its first step, a later one, evaluates, asks and saves."""

    load: int
    first_step: int
    steady_step: int
    evaluation: int
    answers: int
    """0: the recipe asks nothing."""
    save: int

    @property
    def peak(self) -> int:
        """The peak of all phases."""
        return max(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    state: State
    activations: Activations
    gathered: int
    workspace: int
    phases: Phases
    host: int
    """Host memory of this rank's process."""
    checkpoint: int
    """One checkpoint on disk, of all ranks."""
    final: int
    """final/ on disk."""
    rollout: GenerationMemory | None
    """Of writing the answers that are trained; None where they are rows'."""
    parts: tuple[Part, ...]

    @property
    def peak(self) -> int:
        """Most bytes on the device in any phase."""
        return self.phases.peak


def of_setup(inventory: Inventory, setup: Setup) -> Memory:
    """Return the memory of a rank that holds most."""
    recipe, world, rates = setup.recipe, setup.machine.world, setup.machine.rates
    optim_params: Any = recipe.optim.params
    state = states.of_rank(
        inventory,
        setup.engine,
        _optimizer(setup),
        optim_params,
        world=setup.shards,
        offload=setup.offload,
        fp32_gradients=setup.fp32_gradients,
        in_backward=recipe.train.optimizer_in_backward,
    )
    kept = activations(
        inventory,
        tokens=setup.tokens,
        checkpointing=setup.checkpointing,
        kernel=setup.kernel,
        loss=setup.head_loss,
    )
    gathered = setup.footprint.gathered(inventory, setup.ranks)
    block = _block_workspace(inventory, setup, kept)
    fixed = rates.context_bytes + (rates.nccl_bytes if world > 1 else 0)
    others = other_weights.of_setup(inventory, setup)
    beside = inventory.own_buffers + others.device
    model = state.weights + state.quant_constants + state.master + state.optimizer + state.kept_gradients + beside
    lasting = fixed + int((model + gathered.num_bytes) * (1 + rates.fragmentation))
    asks = generation_memory(inventory, setup, kept, held=lasting)
    phases = _phases(inventory, setup, state, kept, asks, gathered.num_bytes, block.num_bytes, fixed, others)
    allocated = phases.peak - fixed
    slack = Part(
        name="context, NCCL and fragmentation",
        num_bytes=fixed + allocated - int(allocated / (1 + rates.fragmentation)),
        formula=f"{'measured' if rates.is_measured else 'allowance'}: {rates.context_bytes / GIB:.1f} GiB CUDA"
        + (f" + {rates.nccl_bytes / GIB:.1f} GiB NCCL" if world > 1 else "")
        + f" + {rates.fragmentation:.0%} of what is allocated",
    )
    checkpoint = _checkpoint(inventory, setup)
    share = -(-checkpoint // world) if setup.recipe.checkpoint.asynchronous else 0
    return Memory(
        state=state,
        activations=kept,
        gathered=gathered.num_bytes,
        workspace=block.num_bytes + slack.num_bytes + beside,
        phases=phases,
        host=HOST_PROCESS_BYTES + state.on_host + others.host + share,
        checkpoint=checkpoint,
        final=sum(
            param.numel * param.item_bytes
            for param in inventory.params
            if param.name.startswith(WRAPPER) and (param.trained or not _adapter(setup))
        ),
        rollout=rollout_memory(inventory, setup, kept, held=lasting),
        parts=(
            *_state_parts(inventory, setup, state),
            Part(name="gathered layers and buckets", num_bytes=gathered.num_bytes, formula=gathered.formula),
            *_activation_parts(setup, kept),
            *_asking_part(asks),
            *_buffers_part(inventory),
            *others.listed(Part),
            block,
            slack,
        ),
    )


def _buffers_part(inventory: Inventory) -> list[Part]:
    if not inventory.own_buffers:
        return []
    formula = "what the method keeps beside its parameters, whole on every rank"
    return [Part(name="the method's buffers", num_bytes=inventory.own_buffers, formula=formula)]


def _adapter(setup: Setup) -> bool:
    return setup.recipe.method.spec.adapter


# -- phases -----------------------------------------------------------------------------------------------------------


def _phases(
    inventory: Inventory,
    setup: Setup,
    state: State,
    kept: Activations,
    asks: GenerationMemory | None,
    gathered: int,
    block: int,
    fixed: int,
    others: OtherWeights,
) -> Phases:
    resident = state.weights + state.quant_constants + state.master + inventory.own_buffers + others.device
    during = setup.footprint.accumulating_bytes(inventory, setup.ranks, state)
    fresh, of_head = _fresh_gradient(inventory, setup), _head_gradient(inventory)
    micro = gathered + max(
        # The last block's backward: everything is still saved, and the head's gradient is there, which the trace takes
        # for the gradient itself.
        during + kept.saved + max(kept.head + max(fresh, 0 if inventory.has_critic else of_head), block),
        # A critic's is over and the policy's head has its own: the critic's gradients are there.
        max(_critic_gradients(inventory, setup), during) + kept.between + max(fresh, of_head),
        max(state.gradients, during) + block,  # the first block's: all gradients are there
    )
    update = state.gradients + state.update + _update_workspace(inventory, setup)
    after = resident + state.optimizer + state.kept_gradients
    figures = {
        "load": _load(inventory, setup, state),
        "first_step": resident + max(micro, update + state.optimizer),
        "steady_step": resident + state.optimizer + max(micro, update),
        "evaluation": after + max(gathered + kept.evaluation, others.forward),
        "answers": 0 if asks is None else after + gathered + asks.num_bytes,
        "save": after + _save_workspace(inventory, setup),
    }
    return Phases(
        **{
            name: fixed + int(value * (1 + setup.machine.rates.fragmentation)) if value else 0
            for name, value in figures.items()
        }
    )


def _load(inventory: Inventory, setup: Setup, state: State) -> int:
    """Return the bytes while weights are filled, sharded and wrapped, with the masters made at the end."""
    end = state.weights + state.quant_constants + state.master + state.kept_gradients
    return max(end, setup.footprint.load_bytes(inventory, state))


def _optimizer(setup: Setup) -> Any:
    """Return the spec of the optimizer that runs, with what the method keeps beside its state."""
    recipe = setup.recipe
    return optimizer_of(recipe.method.spec, recipe.method.params, recipe.optim.spec)


def _update_workspace(inventory: Inventory, setup: Setup) -> int:
    optim = _optimizer(setup)
    matrix = max((p.numel for p in inventory.params if states.is_block_matrix(p)), default=0)
    return optim.update_bytes * sum(p.numel for p in inventory.params if p.trained) + (
        optim.matrix_workspace_bytes * matrix + optim.chunk_bytes
    )


def _save_workspace(inventory: Inventory, setup: Setup) -> int:
    """Count 8-bit moments that become fp32 on the device, a block of the staging area at a time."""
    size = _optimizer(setup).state_bytes
    if size is None or size((2**20,)).per_tensor >= 2**20 * FP32:
        return 0
    local = -(-inventory.trained // setup.shards) if setup.footprint.shards_state else inventory.trained
    return 0 if setup.offload != "none" else min(FP32 * local, CHUNK_BYTES)


def _checkpoint(inventory: Inventory, setup: Setup) -> int:
    """Return bytes of fp32 masters and moments of every trained element; 8-bit moments as the fp32 they stand for."""
    optim, params = _optimizer(setup), setup.recipe.optim.params
    trained = [param for param in inventory.params if param.trained]
    masters = sum(FP32 * param.numel for param in trained)
    moments = 0
    for param in trained:
        size = states.size_of(optim, params, param)
        if size is None:
            return 3 * masters
        is_8bit = optim.elementwise and size.per_tensor < FP32 * param.numel
        moments += 2 * FP32 * param.numel if is_8bit else size.per_tensor
    return masters + moments


# -- temporaries -------------------------------------------------------------------------------------------------------


def _block_workspace(inventory: Inventory, setup: Setup, kept: Activations) -> Part:
    """Return what exists for a moment while a block runs."""
    item = inventory.dtype.itemsize
    largest = inventory.largest_4bit
    whole = largest * item + FP32 * -(-largest // 64)
    shape = largest_attention(inventory.config)
    heads, head_dim = shape.heads, shape.head_dim
    accumulator = 0 if setup.kernel == EAGER else FP32 * setup.tokens * heads * head_dim
    fresh = _fresh_gradient(inventory, setup)
    return Part(
        name="workspace",
        num_bytes=kept.block + whole + accumulator + fresh,
        formula=f"traced temporaries of one block {gib_text(kept.block)}"
        + (f" + one dequantised weight {gib_text(whole)}" if largest else "")
        + (
            f" + flash backward's fp32 query gradients 4 x {setup.tokens:,} tokens x {heads} heads x {head_dim} "
            f"= {gib_text(accumulator)}"
            if accumulator
            else ""
        )
        + (f" + largest new gradient before it is added {gib_text(fresh)}" if fresh else ""),
    )


def _fresh_gradient(inventory: Inventory, setup: Setup) -> int:
    """Return the largest gradient, while it exists beside what it is added to."""
    if setup.recipe.train.optimizer_in_backward:
        # A gradient, or the gradients of a block that are reduced together, and the fp32 copy that the optimizer takes.
        trained = [param.numel for param in inventory.params if param.trained]
        copy = FP32 * max(trained, default=0) // setup.shards if setup.half else 0
        return setup.footprint.fresh_gradient_bytes(inventory, added=True) + copy
    added = setup.micros_per_step > 1 or setup.fp32_gradients
    return setup.footprint.fresh_gradient_bytes(inventory, added=added)


def _critic_gradients(inventory: Inventory, setup: Setup) -> int:
    """Return the gradients of a critic that is a model of its own; 0 without one."""
    if not inventory.has_critic:
        return 0
    critic = tuple(param for param in inventory.params if not param.name.startswith(WRAPPER))
    alone = replace(inventory, params=critic)
    optim: Any = setup.recipe.optim.params
    return states.of_rank(
        alone,
        setup.engine,
        _optimizer(setup),
        optim,
        world=setup.shards,
        offload=setup.offload,
        fp32_gradients=setup.fp32_gradients,
    ).gradients


def _head_gradient(inventory: Inventory) -> int:
    """Return the head's, in the model's type: `chunked_sum` makes it of an fp32 sum, which the trace has seen."""
    head = inventory.samples[-1].module.head.weight
    return head.numel() * head.element_size() if head.requires_grad else 0


# -- reasons ----------------------------------------------------------------------------------------------------------


def _state_parts(inventory: Inventory, setup: Setup, state: State) -> tuple[Part, ...]:
    total, trained = inventory.total, inventory.trained
    rule = setup.footprint.storage(setup.shards)
    four_bit = sum(1 for param in inventory.params if param.double is not None)
    stored = f"{total:,} parameters ({trained:,} trained) in {inventory.dtype.itemsize} bytes"
    if four_bit:
        stored += f", {four_bit} layers in 4 bits"
    constants = "per 64 weights 1 byte, per 16,384 an fp32, and code books" if four_bit else "nothing is quantised"
    spec = setup.recipe.optim.spec
    moments = f"{spec.name} over what this rank updates"
    if setup.offload != "none":
        moments += f"; {gib_text(state.on_host)} in host memory (offload = {setup.offload})"
    return (
        Part(name="weights", num_bytes=state.weights, formula=f"{stored}; {setup.engine}: {rule}"),
        Part(
            name="quantisation constants", num_bytes=state.quant_constants, formula=f"{constants}; whole on each rank"
        ),
        Part(name="gradients", num_bytes=state.gradients, formula=_gradients_formula(setup)),
        Part(
            name="master weights",
            num_bytes=state.master,
            formula="fp32 of what this rank updates" if state.master else "the weights are fp32 themselves",
        ),
        Part(name="optimizer state", num_bytes=state.optimizer, formula=moments),
        Part(
            name="  of it pageable",
            num_bytes=state.pageable,
            formula="moments of tensors of at least 100,000 elements, under a paged optimizer",
        ),
    )


def _gradients_formula(setup: Setup) -> str:
    if setup.recipe.train.optimizer_in_backward:
        return "none: each is used up in the backward pass (the workspace has the largest)"
    if setup.fp32_gradients:
        return f"of trained parameters, in fp32: sums of {setup.micros_per_step} micro-batches of a step"
    return "of trained parameters, in the model's type"


def _activation_parts(setup: Setup, kept: Activations) -> tuple[Part, ...]:
    return (
        Part(
            name="activations",
            num_bytes=kept.saved,
            formula=f"traced on the meta device: {gib_text(kept.saved_per_block)} a block for {setup.tokens:,} tokens, "
            f"checkpointing {setup.checkpointing}" + (f"; {path}" if (path := setup.path.describe()) else ""),
        ),
        Part(
            name="logits",
            num_bytes=kept.head,
            formula=f"traced: beyond the saved activations while head and loss ({setup.loss}) run"
            + ("; all logits exist at once" if setup.loss == "own" else "")
            + (
                f"; a critic's values here: its backward pass is over before the policy's head has its own, with "
                f"{gib_text(kept.between)} of activations and logits in all"
                if kept.between
                else ""
            ),
        ),
    )


def _asking_part(asks: GenerationMemory | None) -> tuple[Part, ...]:
    if asks is None:
        return ()
    formula = (
        f"set {asks.name}: {asks.rows} rows at once x ({asks.prompt:,} + {asks.new_tokens:,} new tokens) of keys and "
        f"values {gib_text(asks.cache)} + a forward over the prompts {gib_text(asks.forward)}; instead of activations"
    )
    return (Part(name="answers (cache and prompts)", num_bytes=asks.num_bytes, formula=formula),)
