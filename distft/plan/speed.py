"""Predicted speed: FLOPs of a micro-batch, the bytes it moves, the bytes it sends, and the time of the three.

Everything here is a prediction: rates are shares of data-sheet peaks that good code reaches, traffic is that of the
traced operations, and communication is taken to overlap with arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distft.engine.footprint import Sent
from distft.model.attention_shape import attention_shapes
from distft.model.cross_entropy import chunked_loss
from distft.plan import rollout_time
from distft.plan.inventory import Inventory
from distft.plan.memory import Memory, Part
from distft.plan.other_weights import teacher_of
from distft.plan.rates import Work, times
from distft.plan.setup import Setup
from distft.plan.trace import activations

DEQUANTISED_BYTES = 2.516
"""Read and written per 4-bit weight each time its layer is dequantised to bf16: 0.516 + 2."""
READS_PER_WRITE = 1.5
"""An operation reads a little more than it writes: of two inputs one is as large as the output."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Predicted; per GPU where it does not say otherwise."""

    flops_per_token: float
    """What the method's mathematics needs: matrix products and causal attention over full sequences."""
    executed_flops_per_token: float
    """FLOPs per token with what activation checkpointing repeats."""
    micro_s: float
    step_s: float
    """One optimizer step."""
    tokens_per_s: float
    """Tokens per second of all GPUs together."""
    tokens_per_s_per_gpu: float
    mfu: float
    hours: float | None
    """Hours of the run; None when the recipe gives epochs, whose tokens only the rows tell."""
    hours_per_billion_tokens: float
    rollout_s: float
    """Seconds of `step_s` in which answers are written and measured; 0 where they are rows'."""
    columns_s: float
    """Seconds of `step_s` in forwards without gradients for what the objective reads, such as a reference."""
    reference_hours_per_billion_tokens: float
    """Hours for log-probabilities that are computed once, before training; 0 where there are none."""
    sent: Sent
    work: Work
    """What the times follow from."""
    parts: tuple[Part, ...]


def of_setup(inventory: Inventory, setup: Setup, memory: Memory) -> Speed:
    """Return the predicted speed of a run that fits."""
    gpu, world, tokens = setup.machine.gpu, setup.machine.world, setup.usual_tokens
    length = tokens if setup.single else setup.recipe.data.max_length
    kept = memory.activations
    if tokens != setup.tokens:
        kept = activations(
            inventory, tokens=tokens, checkpointing=setup.checkpointing, kernel=setup.kernel, loss=setup.head_loss
        )
    matmul, again = _matmul_flops(inventory, setup)
    forward_attention = inventory.rows * _attention_flops(inventory, length)
    attention, attention_again = 3.5 * forward_attention, forward_attention if setup.checkpointing == "full" else 0.0
    moved = kept.traffic * (1 + READS_PER_WRITE)
    four_bit = sum(param.numel for param in inventory.params if param.double is not None)
    passes = 2 if setup.checkpointing == "off" else 3
    moved += four_bit * DEQUANTISED_BYTES * passes
    sends = sent(inventory, setup)
    stored = sum(param.stored_bytes for param in inventory.params) / world
    state, rates = memory.state, setup.machine.rates
    work = Work(
        matmul_flops=tokens * (matmul + again),
        attention_flops=tokens * (attention + attention_again),
        moved_bytes=moved,
        operations=kept.kernels,
        sent_bytes=sends.micro,
        sent_inside_bytes=sends.micro_inside,
        # weights come for forward and backward, gradients go; DeepSpeed overlaps little of it
        offloaded_bytes=3 * stored if setup.offload == "all" else 0.0,
        micros=setup.micros_per_step,
        step_sent_bytes=sends.step,
        step_sent_inside_bytes=sends.step_inside,
        rewritten_bytes=2 * (state.master + state.optimizer) + 2 * state.gradients + 2 * state.weights,
        host_rewritten_bytes=2 * state.on_host,
    )
    taken = times(work, rates, gpu, link_bytes_per_s=setup.machine.link_bytes_per_s)
    in_step, before = setup.column_forwards
    forward, with_values = (
        times(
            _forward(model, setup, tokens, length, share * kept.traffic, share * kept.kernels),
            rates,
            gpu,
            link_bytes_per_s=setup.machine.link_bytes_per_s,
        )
        for model, share in ((inventory.policy, inventory.policy_share), (inventory, 1.0))
    )
    teacher = _teacher_forwards(inventory, setup)
    columns_s = setup.micros_per_step * forward.micro_s * (in_step / _column_passes(setup) + teacher)
    written = rollout_time.of_setup(inventory, setup, memory, forward_s=with_values.micro_s)
    step_s = taken.step_s + columns_s + written.total_s
    per_step = setup.micros_per_step * tokens * world
    needed = matmul + attention
    steps = setup.recipe.train.max_steps
    return Speed(
        flops_per_token=needed,
        executed_flops_per_token=needed + again + attention_again,
        micro_s=taken.micro_s,
        step_s=step_s,
        tokens_per_s=per_step / step_s,
        tokens_per_s_per_gpu=per_step / step_s / world,
        mfu=needed * per_step / step_s / world / gpu.bf16_flops,
        hours=None if steps is None else steps * step_s / 3600,
        hours_per_billion_tokens=1e9 / (per_step / step_s) / 3600,
        rollout_s=written.total_s,
        columns_s=columns_s,
        reference_hours_per_billion_tokens=before * 1e9 * forward.micro_s / (tokens * world) / 3600,
        sent=sends,
        work=work,
        parts=(
            Part(
                name="FLOPs per token",
                num_bytes=round(needed),
                formula="6 per trained weight in a product, 4 per frozen one: "
                f"{matmul / 1e9:.2f} G; causal attention 3.5 x 2 x layers x heads x head size x {length:,}: "
                f"{attention / 1e9:.2f} G; repeated by checkpointing {(again + attention_again) / 1e9:.2f} G",
            ),
            Part(
                name="arithmetic of a micro-batch, us",
                num_bytes=round(taken.compute_s * 1e6),
                formula=f"{tokens:,} tokens at {rates.matmul:.0%} (products) and {rates.attention:.0%} (attention) of "
                f"{gpu.bf16_flops / 1e12:.0f} TFLOP/s",
            ),
            Part(
                name="memory traffic of a micro-batch, us",
                num_bytes=round(taken.memory_s * 1e6),
                formula=f"{moved / 1e9:.0f} GB ({1 + READS_PER_WRITE:g} x what the traced operations write"
                + (f" + {passes} x {DEQUANTISED_BYTES} bytes per 4-bit weight" if four_bit else "")
                + f") at {rates.memory:.0%} of {gpu.memory_bytes_per_s / 1e9:.0f} GB/s",
            ),
            Part(
                name="launches of a micro-batch, us",
                num_bytes=round(taken.launch_s * 1e6),
                formula=f"{kept.kernels:,} traced operations x {rates.launch_s * 1e6:.3g} us: the least there is",
            ),
            Part(
                name="sent per micro-batch, bytes",
                num_bytes=round(sends.micro + sends.micro_inside),
                formula=f"{setup.engine}: {setup.footprint.traffic}; overlapped, at "
                f"{rates.link:.0%} of {setup.machine.link_bytes_per_s / 1e9:.0f} GB/s",
            ),
            Part(
                name="sent per step, bytes",
                num_bytes=round(sends.step + sends.step_inside),
                formula="gradients reduced and weights gathered once: 2 x bytes x (n - 1) / n"
                if sends.step + sends.step_inside
                else "nothing",
            ),
            *_columns_parts(in_step, teacher, before, forward.micro_s, columns_s, _column_passes(setup)),
            *written.parts,
        ),
    )


def _forward(inventory: Inventory, setup: Setup, tokens: int, length: int, traffic: float, kernels: float) -> Work:
    """Return the work of a micro-batch's forward without gradients.

    Its traffic and its launches are taken as a third of those of forward and backward.
    """
    four_bit = sum(param.numel for param in inventory.params if param.double is not None)
    return Work(
        matmul_flops=2.0 * tokens * sum(numel for numel, _ in _linears(inventory)),
        attention_flops=tokens * inventory.rows * _attention_flops(inventory, length),
        moved_bytes=traffic * (1 + READS_PER_WRITE) / 3 + four_bit * DEQUANTISED_BYTES,
        operations=kernels / 3,
        sent_bytes=setup.footprint.sent_in_forward(inventory, setup.ranks),
    )


def _columns_parts(
    in_step: int, teacher: float, before: int, forward_s: float, columns_s: float, shared_by: int
) -> Iterator[Part]:
    if in_step or teacher:
        of_model = f"{in_step} forwards" + (f" / {shared_by} updates" if shared_by > 1 else "")
        of_teacher = f"a teacher's forward, {teacher:.3g} x as long"
        read = " and ".join([of_model] * bool(in_step) + [of_teacher] * bool(teacher))
        yield Part(
            name="what the objective reads, of a step, us",
            num_bytes=round(columns_s * 1e6),
            formula=f"{read}, of each micro-batch without gradients; a forward takes {forward_s * 1e3:.3g} ms",
        )
    if before:
        yield Part(
            name="reference before training, of a micro-batch, us",
            num_bytes=round(before * forward_s * 1e6),
            formula=f"{before} forwards without gradients over all rows, once; kept for later runs",
        )


def _matmul_flops(inventory: Inventory, setup: Setup) -> tuple[float, float]:
    """Return (needed, repeated by checkpointing) per token; see `distft.model.stats.flops_per_token`."""
    needed = sum((6.0 if trained else 4.0) * numel for numel, trained in _linears(inventory))
    blocks = sum(numel for numel, _ in _linears(inventory)) - _head_weights(inventory)
    again = {"off": 0.0, "selective": 1.0, "full": 2.0}[setup.checkpointing] * blocks
    if setup.head_loss is chunked_loss:  # `chunked_sum` repeats nothing
        again += 2.0 * _head_weights(inventory)
    return needed, again


def _linears(inventory: Inventory) -> tuple[tuple[int, bool], ...]:
    return inventory.linears + inventory.critic_linears


def _head_weights(inventory: Inventory) -> int:
    return inventory.samples[0].module.head.weight.numel()


def _attention_flops(inventory: Inventory, length: int) -> float:
    """Return causal forward of one row of blocks per token, over sequences of `length`: 2·L·h·d·s."""
    return 2.0 * sum(shape.width for shape in attention_shapes(inventory.config)) * length


def sent(inventory: Inventory, setup: Setup) -> Sent:
    """Return what a rank sends; counted against running processes in tests/dist/test_traffic.py."""
    return setup.footprint.sent(inventory, setup.ranks)


def _teacher_forwards(inventory: Inventory, setup: Setup) -> float:
    """Return a teacher's forward of a micro-batch in forwards of the trained model, by their weights."""
    teacher = teacher_of(setup)
    if teacher is None:
        return 0.0
    theirs, ours = (sum(numel for numel, _ in model.linears) for model in (teacher, inventory))
    return theirs / ours


def _column_passes(setup: Setup) -> int:
    """Return how many optimizer steps share one pass for columns: those on answers whose tokens are measured once."""
    objective: Any = setup.recipe.objective
    return setup.recipe.rollout.updates if objective.spec.writes and objective.params.values_tokens else 1
