"""Predicts how long a rollout takes: prompts read, answers written token by token, their log-probabilities measured.

Every answer is taken to be as long as allowed and every prompt as long as fits: an upper bound, which answers that end
earlier stay below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.model.inference import cache_bytes_per_token
from distft.plan.inventory import Inventory
from distft.plan.memory import Memory, Part
from distft.plan.rates import Work, times
from distft.plan.setup import Setup


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Predicted seconds of one GPU, for each optimizer step."""

    writing_s: float
    measuring_s: float
    """Forwards without gradients over what was written, where several updates or a critic need them."""
    parts: tuple[Part, ...]

    @property
    def total_s(self) -> float:
        """Both."""
        return self.writing_s + self.measuring_s


NO_ROLLOUT = RolloutTime(writing_s=0.0, measuring_s=0.0, parts=())


def of_setup(inventory: Inventory, setup: Setup, memory: Memory, *, forward_s: float) -> RolloutTime:
    """Return the time of a rollout, shared among its updates; `forward_s`: of a micro-batch, with a critic's values.

    What a server writes takes no time here: it is not known how long.
    """
    recipe, rollout = setup.recipe, setup.recipe.rollout
    if not recipe.objective.spec.writes:
        return NO_ROLLOUT
    objective: Any = recipe.objective.params
    measures = rollout.updates > 1 or objective.values_tokens
    measuring = setup.micros_per_step * forward_s / rollout.updates if measures else 0.0
    measured = Part(
        name="measuring answers, of a step, us",
        num_bytes=round(measuring * 1e6),
        formula=f"a forward without gradients of each micro-batch / {rollout.updates} updates",
    )
    writing, written = _writing(inventory, setup, memory) if memory.rollout is not None else (0.0, ())
    return RolloutTime(writing_s=writing, measuring_s=measuring, parts=(*written, *((measured,) if measures else ())))


def _writing(inventory: Inventory, setup: Setup, memory: Memory) -> tuple[float, tuple[Part, ...]]:
    """Return the seconds of writing the answers, of each optimizer step, and how they come about."""
    recipe, rollout, machine, writes = setup.recipe, setup.recipe.rollout, setup.machine, memory.rollout
    assert writes is not None
    answers = -(-recipe.train.global_batch_size * rollout.answers_per_prompt // machine.world)
    batches, width = -(-answers // writes.rows), inventory.dtype.itemsize
    weights = sum(numel for numel, _ in inventory.linears)
    four_bit = sum(param.numel for param in inventory.params if param.double is not None)
    dequantised = four_bit * 2.0 * width  # written and read again beside its packed values
    cached = writes.prompt + writes.new_tokens / 2  # on average
    read = writes.rows * cached * cache_bytes_per_token(inventory.config, inventory.dtype)
    sent = setup.footprint.sent_in_forward(inventory.policy, setup.ranks)

    def forward(tokens: int, moved: float) -> float:
        work = Work(
            matmul_flops=2.0 * tokens * weights,
            attention_flops=0.0,
            moved_bytes=weights * width + dequantised + moved,
            operations=inventory.policy_share * memory.activations.kernels / 3,
            sent_bytes=sent,
        )
        return times(work, machine.rates, machine.gpu, link_bytes_per_s=machine.link_bytes_per_s).micro_s

    prompts = -(-writes.rows // rollout.answers_per_prompt)  # read once for all of their answers
    token_s, prompt_s = forward(writes.rows, read), forward(prompts * writes.prompt, 0.0)
    writing = batches * (prompt_s + writes.new_tokens * token_s) / rollout.updates
    part = Part(
        name="writing answers, of a step, us",
        num_bytes=round(writing * 1e6),
        formula=f"{answers:,} answers of a GPU, {writes.rows} at once: {batches} x (prompts "
        f"{prompt_s * 1e3:.3g} ms + {writes.new_tokens:,} tokens x {token_s * 1e3:.3g} ms, for weights "
        f"{(weights * width + dequantised) / 1e9:.1f} GB and cache {read / 1e9:.1f} GB read"
        + (f", {sent / 1e9:.1f} GB gathered" if sent else "")
        + f") / {rollout.updates} updates",
    )
    return writing, (part,)
