"""ZeRO stages 1, 2 and 3 (DeepSpeed).

What the library does by itself and this file undoes or pins:
- it divides a loss by the micro-batch count (`scale_wrt_gas`) and averages gradients over ranks: we hand it
  loss x world / weight, so what it accumulates is the gradient of the global mean;
- stage 3 leaves tensors under a threshold whole on every rank: set to 0, so memory is what the formula says;
- communication buckets default to 5e8 elements (gigabytes): set from the model's size;
- it adds the micro-batches of a step, and ranks, in the model's type: in bf16 it is told to take fp32 for both;
- on a CPU it compiles a shared-memory all-reduce at first use (40 s and a C++ compiler); gloo does the same work.
Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.types import LossTerms, Piece, StateReader, StepReport, TrainState, UpdateRule, Weights
from distft.engine import fragments
from distft.engine.base import BaseEngine
from distft.engine.fragments import Fragment
from distft.engine.grad_dtype import GradDtype, keeps_fp32_gradients
from distft.engine.gradient_sums import warn_of_bf16_sums
from distft.engine.groups import group_size
from distft.engine.node_group import reading_once
from distft.engine.params import Zero3Params, Zero12Params
from distft.engine.processes import Processes
from distft.engine.zero_footprint import bucket_elements


class ZeroEngine(BaseEngine):
    """One class for the three stages; they differ in configuration and in where tensors are read back from."""

    def __init__(self, stage: int, params: Zero12Params | Zero3Params, processes: Processes) -> None:
        super().__init__(processes)
        self.name = f"zero{stage}"
        self._stage, self.collective_forward = stage, stage == 3
        self._offload = params.offload
        self._grad_dtype: GradDtype = params.grad_dtype
        within = params.shard_within if isinstance(params, Zero3Params) else "world"
        self._second = group_size(within, processes)
        self._deepspeed = _import_deepspeed()
        self._last = True

    def setup(self, weights: Weights, rule: UpdateRule, *, micros_per_step: int) -> None:
        """Fill and (stage 3) partition block by block, then let DeepSpeed take the rest over."""
        self._rule = rule
        module = weights.module
        numel = sum(param.numel() for param in module.parameters())
        largest = max(param.numel() for param in module.parameters())
        config = self._config(weights.dtype, rule, micros_per_step, bucket_elements(numel, largest))
        group = self._second_copy_group()
        with reading_once(weights, self._processes):
            for unit in [*weights.blocks, module]:
                weights.fill(unit, self.device)
                if self._stage == 3:
                    self._deepspeed.zero.Init(
                        module=unit, config_dict_or_path=config, dtype=weights.dtype, zero_param_parallel_group=group
                    )
        if self._stage == 3 and weights.blocks_are_atomic:
            # A block is gathered whole, before its forward: fewer and larger gathers, and none inside a region that
            # selective activation checkpointing replays.
            self._deepspeed.utils.set_z3_leaf_modules(module, list({type(block) for block in weights.blocks}))
        trainable = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        self._wrapped, self._optimizer, _, _ = self._deepspeed.initialize(
            model=module, optimizer=rule.build(rule.groups(trainable)), config=config, dist_init_required=False
        )
        if self._stage == 1 and self._keeps_fp32(weights.dtype, micros_per_step):
            _add_in_fp32(self._optimizer)
        self._module = self._wrapped
        self._wrapped.train()
        self._check_partitioned()

    def _keeps_fp32(self, dtype: torch.dtype, micros: int) -> bool:
        return keeps_fp32_gradients(self._grad_dtype, half=dtype == torch.bfloat16, micros_per_step=micros)

    def _config(self, dtype: torch.dtype, rule: UpdateRule, micros: int, bucket: int) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self._stage,
            "contiguous_gradients": True,
            "overlap_comm": self.device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Else stages 1 and 2 reduce every gradient to all ranks, though each is wanted on one: twice the traffic.
            "use_multi_rank_bucket_allreduce": False,
        }
        if self._stage == 3:
            zero |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": 2 * bucket,
                "stage3_max_reuse_distance": bucket,
            }
            if self._second < self.world:
                zero["zero_hpz_partition_size"] = self._second
        pinned = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self._offload in ("optimizer", "all"):
            zero["offload_optimizer"] = pinned
        if self._offload == "all":
            zero["offload_param"] = pinned
        if dtype == torch.bfloat16 and self._grad_dtype == "bfloat16" and self.rank == 0:
            warn_of_bf16_sums(micros)
        added: dict[str, Any] = {}
        if dtype == torch.bfloat16 and self._grad_dtype != "bfloat16":
            added["communication_data_type"] = "fp32"
        if self._stage > 1 and self._keeps_fp32(dtype, micros):  # of stage 1 the key selects another optimizer class
            added["data_types"] = {"grad_accum_dtype": "fp32"}
        return {
            **added,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micros,
            "gradient_clipping": rule.max_grad_norm or 0.0,
            # Without the check a non-finite norm in bf16 would be clipped into non-finite weights.
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # torch's AdamW on the host: no C++ compiler at run time.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def _second_copy_group(self) -> Any:
        """Return the ranks with a second copy of the weights (hpZ); without it each `zero.Init` would make a group."""
        if self._second == self.world:
            return None
        groups = self._deepspeed.utils.groups
        groups._create_zero_param_parallel_group(self._second)
        return groups._get_zero_param_intra_parallel_group()

    def _check_partitioned(self) -> None:
        stage = self._wrapped.zero_optimization_stage()
        if stage != self._stage:
            raise MachineError(f"zero{self._stage} was asked for, DeepSpeed runs stage {stage}")
        spans = torch.distributed.get_world_size(self._wrapped.data_parallel_group)
        if spans != self.world:
            raise MachineError(f"DeepSpeed spans {spans} processes, {self.world} were started")
        if self._stage == 3:
            biggest: Any = max(self._wrapped.module.parameters(), key=lambda param: param.ds_numel)
            if biggest.numel() != 0 or biggest.ds_tensor.numel() > math.ceil(biggest.ds_numel / self.world):
                raise MachineError(f"zero3 was asked for, but the largest parameter is whole on rank {self.rank}")

    @property
    def inference_module(self) -> nn.Module:
        """Stage 3 gathers in the wrapped module; below it every rank has the weights."""
        return self.model if self._stage == 3 else self._wrapped.module

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """Tell DeepSpeed, before the forward, whether this micro-batch ends the step."""
        self._last = last
        self._wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        with super().accumulating(last=last, seed=seed):
            yield

    def backward(self, terms: LossTerms, *, divide_by: float, samples: tuple[str, ...]) -> None:
        """Multiply by the world, as DeepSpeed averages over ranks, to make that a sum."""
        self._remember(terms, samples)
        self._wrapped.backward(terms.loss_sum * (self.world / divide_by), scale_wrt_gas=False)
        if self._stage == 1 and self._last and self._optimizer.use_grad_accum_attribute:
            # Reduced into this rank's part by now; DeepSpeed would keep the whole sums through the update.
            self._optimizer.zero_grad(set_to_none=True)

    def step(self, state: TrainState, denominator: float, allow_update: Callable[[float], bool]) -> StepReport:
        """Check the loss before DeepSpeed's step; a bad norm makes that step skip the update on all ranks."""
        sums, _ = self._summed(self._step_sums())
        accepted = math.isfinite(sums[0]) and allow_update(sums[0] / denominator)
        lr = self.rule.lr_at(state.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        with contextlib.nullcontext() if accepted else _held(self._optimizer.optimizer):
            self._wrapped.step()
        overflow = self._optimizer.overflow
        grad_norm = math.nan if overflow else float(self._wrapped.get_global_grad_norm())
        updated = accepted and not overflow
        return self._report(state, sums=sums, grad_norm=grad_norm, lr=lr, denominator=denominator, updated=updated)

    def create_state(self) -> None:
        """Create the state of this rank's partition; stages 1 and 2 have made it long before."""
        fragments.create_state(self._flats(), self._step_inner, self._optimizer.optimizer)

    def pieces(self) -> Iterator[Piece]:
        """Yield the masters and optimizer state of this rank's partition."""
        return fragments.pieces(self._fragments(), self._optimizer.optimizer)

    def restore(self, reader: StateReader, state: TrainState) -> None:
        """Restore the fp32 partitions, and from there the parameters that compute."""
        inner = self._optimizer.optimizer
        self.create_state()
        held = list(self._fragments())
        fragments.load(held, inner, reader, optimizer_step=state.updates)
        if self._stage < 3:
            self._optimizer.update_lp_params()
            return
        params: dict[str, Any] = dict(self._wrapped.module.named_parameters())
        for fragment in held:  # DeepSpeed's own setters reach the master only
            params[fragment.name].ds_tensor.data[: fragment.length].copy_(fragment.of(fragment.flat.detach()))
        self._optimizer.invalidate_secondary_tensor()  # else hpZ computes with the copies of before

    def _weights_here(self) -> Iterator[tuple[str, Tensor]]:
        if self._stage < 3:
            return super()._weights_here()
        named: Any = self._wrapped.module.named_parameters()  # empty between forwards
        return ((name, param.ds_tensor.data) for name, param in named if param.requires_grad)

    def _forget_gathered(self) -> None:
        if self._stage == 3:
            self._optimizer._partition_all_parameters()
            self._optimizer.invalidate_secondary_tensor()  # else hpZ computes with the copies of before

    def _flats(self) -> list[Tensor]:
        optimizer = self._optimizer
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    def _step_inner(self) -> None:
        """Step the inner optimizer as stage 3 does: it sees one flat tensor at a time."""
        optimizer, inner = self._optimizer, self._optimizer.optimizer
        if self._stage < 3:
            inner.step()
            return
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            group = inner.param_groups[optimizer.sub_group_to_group_id[index]]
            group["params"] = [flat]
            inner.step()
            group["params"] = []

    def _fragments(self) -> Iterator[Fragment]:
        """Yield where each parameter's elements on this rank lie.

        Stage 3: rank r holds [r·c, (r+1)·c) of each tensor, c = ceil(numel / world). Stages 1 and 2: one flat tensor
        of all parameters is cut into `world` parts, so a parameter may lie on two ranks or on one.
        """
        optimizer = self._optimizer
        for name, raw in self._wrapped.module.named_parameters():
            param: Any = raw
            if not param.requires_grad:
                continue
            if self._stage == 3:
                group, offset, chunk = optimizer.grad_position[optimizer.get_param_id(param)]
                start = min(self.rank * chunk, param.ds_numel)
                length = min(chunk, param.ds_numel - start)
                flat, numel = optimizer.fp32_partitioned_groups_flat[group], param.ds_numel
                part = f"flat3-{self.rank}-of-{self.world}/{group}"
            else:
                held = getattr(param, "_hp_mapping", None)
                if held is None:  # this rank's part of the flat tensor does not touch the parameter
                    continue
                start, length = held.lp_fragment_address.start, held.lp_fragment_address.numel
                flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
                offset, numel = held.hp_fragment_address.start, param.numel()
                part = f"flat-{self.rank}-of-{self.world}/{held.param_group_index}"
            yield Fragment(name=name, numel=numel, start=start, length=length, flat=flat, offset=offset, layout=part)

    def full_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Gather one tensor at a time."""
        module: nn.Module = self._wrapped.module
        tensors: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers())
        for name in names:
            partitioned = [tensors[name]] if hasattr(tensors[name], "ds_id") else []
            with self._deepspeed.zero.GatheredParameters(partitioned):
                tensor = tensors[name].detach()
                yield name, tensor.cpu().clone() if self.rank == 0 else tensor.new_empty(0)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, then leave the process group."""
        if self._module is not None:
            self._wrapped.destroy()
        if self._second < self.world:  # a global of the library, which the next run would find
            self._deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        if self._processes.joined:  # by DeepSpeed, which else hands its groups to the next run of this Python process
            self._deepspeed.comm.destroy_process_group()
        super().close()


def _add_in_fp32(optimizer: Any) -> None:
    """Have stage 1's optimizer add micro-batches in fp32, as its constructor does where it is told to.

    The key of the configuration that tells it, `data_types.grad_accum_dtype`, has the engine take BF16_Optimizer for
    stage 1, whose state lies otherwise. Nothing has been allocated by these settings before the first backward pass.
    To be deleted when a version later than DeepSpeed 0.19.8 takes the key for stage 1 too.
    """
    if optimizer.use_grad_accum_attribute or not optimizer.contiguous_gradients:
        raise MachineError("this version of DeepSpeed adds gradients of stage 1 in a way that is not known here")
    optimizer.gradient_accumulation_dtype = torch.float32
    optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = True


@contextlib.contextmanager
def _held(inner: torch.optim.Optimizer) -> Iterator[None]:
    """Let our optimizer do nothing for one of DeepSpeed's steps, which clears its gradients and buffers."""
    inner.step = lambda closure=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del inner.step


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise MachineError(
            "the engine needs DeepSpeed, which is not installed; "
            'pip install "distft[deepspeed]", or choose [engine] name = "fsdp2"'
        ) from error
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():  # looking at this table probes for compilers, for seconds
        # Read by deepspeed.comm before it compiles its shared-memory all-reduce; unset means "not compatible".
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=None)
    return deepspeed


def open_engine(name: str, params: Zero12Params | Zero3Params, processes: Processes) -> ZeroEngine:
    """Return the engine, before it has a model."""
    return ZeroEngine(int(name.removeprefix("zero")), params, processes)
