"""One row of a plan: a recipe under one method and engine on one machine, its memory, whether it fits, its speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.plan import auto_setup, memory, speed
from distft.plan.inventory import Inventory
from distft.plan.memory import Memory
from distft.plan.setup import Machine, Setup, has_liger, resolve_engine
from distft.plan.speed import Speed
from distft.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """What is predicted for one setup."""

    setup: Setup
    parameters: int
    """Parameters of the model, adapters included."""
    trained: int
    """Parameters that are trained."""
    memory: Memory
    speed: Speed
    chosen: str
    """Why this micro-batch and this checkpointing."""

    @property
    def fits(self) -> bool:
        """The peak, less what a paged optimizer can move to the host, is inside the device's memory."""
        return self.spare_bytes >= 0

    @property
    def spare_bytes(self) -> int:
        """Usable memory less the peak; negative when it does not fit."""
        return self.setup.machine.gpu.memory_bytes - (self.memory.peak - self.memory.state.pageable)

    @property
    def paged_bytes(self) -> int:
        """Optimizer state that has to move to host memory at the peak."""
        over = self.memory.peak - self.setup.machine.gpu.memory_bytes
        return max(0, min(over, self.memory.state.pageable))

    def to_json(self) -> dict[str, Any]:
        """Return one element of `cases` in `distft plan --json`."""
        setup, state, phases = self.setup, self.memory.state, self.memory.phases
        kept, fast = self.memory.activations, self.speed
        recipe, gpu = setup.recipe, setup.machine.gpu
        return {
            "method": recipe.method.name,
            "engine": setup.engine,
            "world": setup.machine.world,
            "gpu": gpu.name,
            "fits": self.fits,
            "per_rank": {
                "weights_bytes": state.weights,
                "quant_constants_bytes": state.quant_constants,
                "gradients_bytes": state.gradients,
                "master_bytes": state.master,
                "optimizer_bytes": state.optimizer,
                "pageable_bytes": state.pageable,
                "gathered_bytes": self.memory.gathered,
                "activations_bytes": kept.saved,
                "logits_bytes": kept.head,
                "workspace_bytes": self.memory.workspace,
                "peak_bytes": self.memory.peak,
            },
            "phases": {f"{name}_bytes": value for name, value in vars(phases).items()},
            "host_bytes": self.memory.host,
            "disk_bytes": recipe.checkpoint.keep * self.memory.checkpoint + self.memory.final,
            "checkpoint_bytes": self.memory.checkpoint,
            "tokens_per_s_predicted": fast.tokens_per_s,
            "tokens_per_s_per_gpu_predicted": fast.tokens_per_s_per_gpu,
            "mfu_predicted": fast.mfu,
            "step_s_predicted": fast.step_s,
            "hours_predicted": fast.hours,
            "hours_per_billion_tokens_predicted": fast.hours_per_billion_tokens,
            "columns_s_predicted": fast.columns_s,
            "rollout_s_predicted": fast.rollout_s,
            "answers_at_once": None if self.memory.rollout is None else self.memory.rollout.rows,
            "reference_hours_per_billion_tokens_predicted": fast.reference_hours_per_billion_tokens,
            "flops_per_token": fast.flops_per_token,
            "rates": setup.machine.rates.source or "assumed",
            "gpu_bytes": gpu.memory_bytes,
            "spare_bytes": self.spare_bytes,
            "paged_bytes": self.paged_bytes,
            "activations_bytes_per_block": kept.saved_per_block,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "optimizer": recipe.optim.name,
            "offload": setup.offload,
            "micro_batch_size": setup.micro_batch_size,
            "micros_per_step": setup.micros_per_step,
            "gradients_in": "float32" if setup.fp32_gradients or not setup.half else "bfloat16",
            "max_length": recipe.data.max_length,
            "activation_checkpointing": setup.checkpointing,
            "cross_entropy": setup.loss,
            "path": setup.path.to_json(),
            "tokens_per_forward": setup.usual_tokens,
        }


def plan(
    recipe: Recipe,
    inventory: Inventory,
    machine: Machine,
    *,
    liger: bool | None = None,
    wants: str = "",
    document_tokens: int | None = None,
) -> PlanCase:
    """Plan the recipe on the machine, choosing what it leaves to `auto`.

    Args:
        recipe: what runs.
        inventory: of its model, with the path that was proven.
        machine: where it runs.
        liger: whether the run will have liger-kernel; None: as this machine has it.
        wants: what the launcher was configured for.
        document_tokens: of a row on average, where that is known; matters only with one document per forward.

    Raises:
        RecipeError: the global batch does not split over the machine.
        MachineError: the engine cannot do what method, optimizer or offload need.
    """
    engine = resolve_engine(recipe, machine, wants=wants)
    fused = has_liger() if liger is None else liger
    chosen = auto_setup.choose(recipe, inventory, machine, engine=engine, liger=fused, document_tokens=document_tokens)
    held = memory.of_setup(inventory, chosen.setup)
    return PlanCase(
        setup=chosen.setup,
        parameters=inventory.total,
        trained=inventory.trained,
        memory=held,
        speed=speed.of_setup(inventory, chosen.setup, held),
        chosen=chosen.reason,
    )
