"""One way of running a recipe on one machine: every choice made, nothing computed yet."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from distft.columns import COLUMNS, keeps_reference
from distft.core.accelerators import Accelerator
from distft.core.registry import Params
from distft.engine import ENGINES, EngineSpec
from distft.engine.auto import choose as choose_engine
from distft.engine.footprint import EngineSetup, Footprint
from distft.engine.groups import group_size
from distft.engine.processes import Processes
from distft.model import cross_entropy
from distft.model.adapters.spec import leaves_base_alone, optimizer_of
from distft.model.cross_entropy import HeadLoss
from distft.model.paths import ForwardPath
from distft.plan import kernels
from distft.plan.rates import ASSUMED, HardwareRates
from distft.recipe import Recipe, check_world, refuse_engine, refuse_sums


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of one kind in nodes of one size."""

    gpu: Accelerator
    gpus_per_node: int
    nodes: int = 1
    rates: HardwareRates = ASSUMED
    """What these GPUs reach."""
    on_cpu: bool = False
    """Processes compute on a CPU, whose kernels keep other tensors."""

    @property
    def world(self) -> int:
        """Processes: one for each GPU."""
        return self.gpus_per_node * self.nodes

    @property
    def link_bytes_per_s(self) -> float:
        """Slowest link that a collective over all GPUs crosses."""
        return self.gpu.link_bytes_per_s if self.nodes == 1 else self.gpu.between_nodes_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What memory and speed follow from, together with the model."""

    recipe: Recipe
    machine: Machine
    engine: str
    micro_batch_size: int
    micros_per_step: int
    """Forwards of a step on one rank."""
    checkpointing: str
    """off | selective | full."""
    loss: str
    """fused | chunked | full | own: the model's own head, whose logits all exist at once."""
    path: ForwardPath = field(default_factory=ForwardPath)
    """How the model's numbers are computed."""
    document_tokens: int | None = None
    """Tokens of a row on average, where it is known and each has a forward of its own; None: `max_length`."""

    @property
    def single(self) -> bool:
        """Each document has a forward of its own."""
        return self.path.documents == "single"

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch: packed sequences are taken as full, a document alone as the longest there is."""
        return self.recipe.data.max_length * (1 if self.single else self.micro_batch_size)

    @property
    def usual_tokens(self) -> int:
        """Tokens of a micro-batch on average."""
        return self.document_tokens or self.tokens

    @property
    def offload(self) -> str:
        """None | optimizer | all."""
        params: Any = self.recipe.engine.params
        return getattr(params, "offload", "none")

    @property
    def footprint(self) -> Footprint:
        """What the engine costs."""
        return ENGINES[self.engine].footprint

    @property
    def ranks(self) -> EngineSetup:
        """What the footprint follows from besides the model."""
        return EngineSetup(
            params=_params_for(ENGINES[self.engine], self.recipe.engine.params),
            world=self.machine.world,
            node=self.machine.gpus_per_node,
            half=self.half,
            micros_per_step=self.micros_per_step,
        )

    @property
    def shards(self) -> int:
        """Ranks that cut one tensor among themselves, under an engine that cuts."""
        return self.footprint.shards(self.ranks)

    @property
    def fp32_gradients(self) -> bool:
        """Gradients of a bf16 model are kept in fp32 until the update."""
        return self.footprint.keeps_fp32_gradients(self.ranks)

    @property
    def half(self) -> bool:
        """The model computes in bf16."""
        return self.recipe.model.dtype == "bfloat16"

    @property
    def head_loss(self) -> HeadLoss:
        """What runs, or on the meta device stands for it (see `distft.model.cross_entropy.choose`)."""
        per_token = self.recipe.objective.spec.per_token
        return {
            "own": cross_entropy.full_loss,
            "fused": kernels.fused_loss,
            "chunked": cross_entropy.chunked_loss if per_token else cross_entropy.chunked_sum,
            "full": cross_entropy.full_loss,
        }[self.loss]

    @property
    def reference_before_training(self) -> bool:
        """The reference's log-probabilities are computed once: the method changes the base itself, or it is another."""
        objective = self.recipe.objective
        another = objective.spec.reference(objective.params) is not None
        apart = leaves_base_alone(self.recipe.method.spec, self.recipe.method.params)
        return another or not (apart or objective.spec.writes)

    @property
    def keeps_reference(self) -> bool:
        """The weights of before training stay beside the trained ones (`Engine.frozen_weights`)."""
        return keeps_reference(self.recipe)

    @property
    def column_forwards(self) -> tuple[int, int]:
        """Forwards without gradients for what the objective reads (`distft.columns`).

        Returns:
            For each micro-batch of a step; for each row once, before training.
        """
        objective = self.recipe.objective
        columns = [COLUMNS[name] for name in objective.spec.columns(objective.params)]
        policy = sum(column.policy_forwards for column in columns)
        reference = sum(column.reference_forwards for column in columns)
        return (policy, reference) if self.reference_before_training else (policy + reference, 0)

    @property
    def kernel(self) -> str:
        """What stands for the path's attention."""
        return kernels.of_path(self.path, on_cpu=self.machine.on_cpu)


def _params_for(spec: EngineSpec, chosen: Params) -> Params:
    """Return the recipe's engine params as those of the engine that runs, which `auto` or a launcher chose."""
    if isinstance(chosen, spec.params):
        return chosen
    return spec.params(**{key: value for key, value in chosen if key in spec.params.model_fields})


def has_liger() -> bool:
    """Return whether liger-kernel, and with it the fused loss, is installed here."""
    return importlib.util.find_spec("liger_kernel") is not None


def forwards(recipe: Recipe, world: int, path: ForwardPath, micro_batch_size: int, document_tokens: int | None) -> int:
    """Return the number of forwards of one step on one rank.

    With documents alone there are as many as documents: one for each sequence, or, packed, as many as fill it. A
    micro-batch of several sequences is none of a model's concern then.

    Raises:
        RecipeError: the global batch does not split over `world` processes, or an update in the backward pass has
            several micro-batches.
    """
    micros = check_world(recipe, world, micro_batch_size)
    refuse_sums(recipe, micros if path.documents == "packed" else micros * micro_batch_size)
    if path.documents == "packed":
        return micros
    sequences = micros * micro_batch_size
    if not recipe.data.packing or document_tokens is None:
        return sequences
    return max(sequences, round(sequences * recipe.data.max_length / document_tokens))


def loss_of(recipe: Recipe, *, liger: bool, path: ForwardPath | None = None) -> str:
    """Return the head's loss on a GPU (see `distft.model.cross_entropy.choose`); `liger`: the package is there."""
    if path is not None and path.head == "own":
        return "own"
    wanted = recipe.model.cross_entropy
    if wanted != "auto":
        return wanted
    return "fused" if liger and not recipe.objective.spec.per_token else "chunked"


def resolve_engine(recipe: Recipe, machine: Machine, *, wants: str = "") -> str:
    """Return the engine the job would run on this machine; `wants`: what its launcher was configured for.

    Raises:
        MachineError: it cannot.
        RecipeError: the engine cannot train what the recipe asks for.
    """
    params: Any = recipe.engine.params
    there = Processes(
        rank=0,
        world=machine.world,
        local_rank=0,
        device=torch.device("cuda"),
        launcher="plan",
        wants=wants,
        joined=False,
        local_world=machine.gpus_per_node,
    )
    group_size(getattr(params, "shard_within", "world"), there)
    name, _ = choose_engine(
        recipe.engine.name,
        ENGINES,
        there,
        trains_all=not recipe.method.spec.adapter,
        elementwise=optimizer_of(recipe.method.spec, recipe.method.params, recipe.optim.spec).elementwise,
        offload=getattr(recipe.engine.params, "offload", "none"),
    )
    refuse_engine(recipe, name, ENGINES)
    return name
