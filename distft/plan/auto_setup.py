"""`micro_batch_size = "auto"` and `activation_checkpointing = "auto"`: the fastest pair that fits.

The plan and the job ask the same function, so what was planned is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distft.core.accelerators import GIB
from distft.core.errors import Problem, RecipeError
from distft.engine import ENGINES
from distft.model.paths import ForwardPath
from distft.plan import inventory as inventories
from distft.plan import memory, speed
from distft.plan.inventory import Inventory
from distft.plan.setup import Machine, Setup, forwards, has_liger, loss_of, resolve_engine
from distft.recipe import Recipe, check_world

MICRO_TOKENS = 16_384
"""Largest micro-batch that `auto` takes: beyond it products are no faster."""
ROOM = 0.94
"""Share of the device that `auto` fills: predictions are good to about 5 %."""


@dataclass(frozen=True, kw_only=True)
class AutoSetup:
    """A setup and the reason for what was left open in the recipe."""

    setup: Setup
    reason: str

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward and backward on one GPU."""
        return self.setup.micro_batch_size

    @property
    def checkpointing(self) -> str:
        """Off | selective | full."""
        return self.setup.checkpointing


def for_job(recipe: Recipe, folder: Path, machine: Machine, *, wants: str, path: ForwardPath) -> AutoSetup:
    """Return what a job on this machine runs with.

    Args:
        recipe: of the job.
        folder: holds config.json.
        machine: where the job runs.
        wants: the launcher's engine family.
        path: that was proven here.

    Raises:
        RecipeError: the global batch does not split over the machine.
        MachineError: the engine cannot run there.
    """
    head = recipe.objective.spec.head_of(recipe.objective.params)
    inventory = inventories.read(recipe.model, folder, recipe.method.spec, recipe.method.params, path=path, head=head)
    engine = resolve_engine(recipe, machine, wants=wants)
    return choose(recipe, inventory, machine, engine=engine, liger=has_liger())


def choose(
    recipe: Recipe,
    inventory: Inventory,
    machine: Machine,
    *,
    engine: str,
    liger: bool,
    document_tokens: int | None = None,
) -> AutoSetup:
    """Choose the recipe's own values, and for `auto` the pair predicted to be fastest among those that fit.

    When nothing fits, what needs least: one sequence, and full checkpointing. `document_tokens`: see `Setup`.

    Raises:
        RecipeError: the global batch does not split over the machine, or nobody can know yet what is trained.
    """
    if why := recipe.method.spec.unplanned(recipe.method.params):
        fix = "give micro_batch_size and activation_checkpointing, which a run takes without a plan; or rho = 1.0"
        line = recipe.line_of("method.init") or recipe.line_of("method.name")
        raise RecipeError(recipe.source, [Problem(message=f"[method] {why}: it cannot be planned", line=line, fix=fix)])
    micros = _micros(recipe, machine, inventory.path)
    modes = _modes(recipe, engine)
    limit = ROOM * machine.gpu.memory_bytes

    def setup_of(micro: int, mode: str) -> Setup:
        return Setup(
            recipe=recipe,
            machine=machine,
            engine=engine,
            micro_batch_size=micro,
            micros_per_step=forwards(recipe, machine.world, inventory.path, micro, document_tokens),
            checkpointing=mode,
            loss=loss_of(recipe, liger=liger, path=inventory.path),
            path=inventory.path,
            document_tokens=document_tokens if inventory.path.documents == "single" else None,
        )

    setups = [setup_of(size, mode) for mode in modes for size in micros]
    if len(setups) == 1:
        return AutoSetup(setup=setups[0], reason="as the recipe says")
    best: tuple[float, Setup] | None = None
    for mode in modes:
        for setup in (
            candidate for candidate in setups if candidate.checkpointing == mode
        ):  # large micro-batches first
            held = memory.of_setup(inventory, setup)
            if held.peak - held.state.pageable > limit:
                continue
            fast = speed.of_setup(inventory, setup, held).tokens_per_s
            if best is None or fast > 1.01 * best[0]:
                best = (fast, setup)
            break
    if best is None:
        return AutoSetup(
            setup=setups[-1],
            reason=f"nothing fits {limit / GIB:.1f} GiB ({ROOM:.0%} of the device): the smallest there is",
        )
    rate, setup = best
    return AutoSetup(
        setup=setup,
        reason=f"fastest that fits {limit / GIB:.1f} GiB ({ROOM:.0%} of the device): "
        f"{rate / machine.world:,.0f} tokens/s per GPU predicted",
    )


def _micros(recipe: Recipe, machine: Machine, path: ForwardPath) -> list[int]:
    """Return the micro-batch sizes to try, largest first."""
    configured = recipe.train.micro_batch_size
    if configured != "auto":
        check_world(recipe, machine.world, configured)
        return [configured]
    share = check_world(recipe, machine.world, 1)
    if path.documents == "single":
        return [1]
    if recipe.train.optimizer_in_backward:
        return [share]
    most = max(1, MICRO_TOKENS // recipe.data.max_length)
    return [size for size in range(min(share, most), 0, -1) if share % size == 0]


def _modes(recipe: Recipe, engine: str) -> list[str]:
    wanted = recipe.train.activation_checkpointing
    if wanted != "auto":
        return [wanted]
    replays = not (ENGINES[engine].footprint.gathers_inside_blocks and recipe.method.spec.adapter)
    return ["off", "selective", "full"] if replays else ["off", "full"]
