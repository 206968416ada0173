"""The plan of a case as it ran: same engine, processes, micro-batch and savers, beside what was counted there."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distft.bench.cases import BenchCase
from distft.core import accelerators
from distft.core.accelerators import GIB
from distft.core.errors import DistftError
from distft.model.adapters.spec import optimizer_of

STATE = ("weights", "quant_constants", "gradients", "master", "optimizer", "pageable")


class Planning:
    """Plans cases of one model; what is read for one serves the next."""

    def __init__(self) -> None:
        self._planners: dict[str, Any] = {}

    def beside(self, case: BenchCase, record: dict[str, Any]) -> dict[str, Any]:
        """Return the record with `planned`; with why there is none where the planner cannot plan it.

        A case that ran out of memory is planned as the recipe says, for nobody lived to tell what was chosen.
        """
        if record["outcome"] not in ("measured", "memory"):
            return record
        try:
            return record | {"planned": self._plan(case, record)}
        except DistftError as error:
            return record | {"planned": None, "not_planned": str(error).splitlines()[0]}

    def _plan(self, case: BenchCase, record: dict[str, Any]) -> dict[str, Any]:
        from distft.model import load
        from distft.model.paths import ForwardPath
        from distft.plan import state
        from distft.plan.calibration import of_gpu
        from distft.plan.case import plan
        from distft.plan.machine import of_size
        from distft.plan.planner import Planner, engine_override
        from distft.plan.setup import Machine
        from distft.recipe import parse_recipe

        requested = _requested_of(record)
        ran = requested | (record.get("ran") or {})  # records of older versions say less
        base_recipe = case.recipe
        changes = [
            *engine_override(base_recipe, ran["engine"]),
            f"train.micro_batch_size={ran['micro_batch_size']}",
            f'train.activation_checkpointing="{ran["activation_checkpointing"]}"',
            f'model.cross_entropy="{ran["cross_entropy"]}"',
        ]
        recipe = parse_recipe(case.text, source=case.key, registries=_registries(), overrides=changes)
        gib = (ran["device_bytes"] or record["hardware"]["memory_gib"] * GIB / case.world) / GIB
        accelerator = accelerators.of_device(ran["device"])
        gpu = replace(accelerator, memory_gib=gib) if accelerator is not None else of_size(gib)
        machine = Machine(gpu=gpu, gpus_per_node=case.world, on_cpu=ran["device"] == "cpu", rates=of_gpu(gpu))
        folder = str(load.find_folder(recipe.model))
        if folder not in self._planners:
            self._planners[folder] = Planner(path=case.key, overrides=(), folder=Path(folder), machine=machine)
        planner, path = self._planners[folder], ran["path"]
        planner.path_of_model = None if path is None else ForwardPath(**path)
        inventory = planner.inventory(recipe)
        fused = ran["cross_entropy"] == "fused"
        predicted = plan(recipe, inventory, machine, liger=fused, document_tokens=ran["row_tokens"])
        rates = machine.rates
        fixed = rates.context_bytes + (rates.nccl_bytes if case.world > 1 else 0)
        ranks = [
            state.of_rank(
                inventory,
                ran["engine"],
                optimizer_of(recipe.method.spec, recipe.method.params, recipe.optim.spec),
                recipe.optim.params,
                world=predicted.setup.shards,
                rank=rank % predicted.setup.shards,
                offload=predicted.setup.offload,
                fp32_gradients=predicted.setup.fp32_gradients,
            )
            for rank in range(case.world)
        ]
        shown = predicted.to_json()
        return {
            "per_rank": shown["per_rank"],
            "phases": shown["phases"],
            # What the allocator is asked for: without context, NCCL and the allowance for fragmentation.
            "tensors": {
                name: round((value - fixed) / (1 + rates.fragmentation))
                for name, value in vars(predicted.memory.phases).items()
            },
            "state_by_rank": [{f"{name}_bytes": getattr(rank_state, name) for name in STATE} for rank_state in ranks],
            "tokens_per_s_predicted": shown["tokens_per_s_predicted"] if accelerator is not None else None,
            "mfu_predicted": shown["mfu_predicted"] if accelerator is not None else None,
            "step_s_predicted": shown["step_s_predicted"] if accelerator is not None else None,
            "work": asdict(predicted.speed.work),
            "rates": asdict(rates),
        }


def _requested_of(record: dict[str, Any]) -> dict[str, Any]:
    case = record["case"]
    gpus, wanted, loss = record["hardware"]["gpus"], case["activation_checkpointing"], case["model"]["cross_entropy"]
    return {
        "engine": case["engine"],
        "micro_batch_size": case["micro_batch_size"] if case["micro_batch_size"] != "auto" else 1,
        "activation_checkpointing": wanted if wanted != "auto" else "full" if gpus else "off",
        "cross_entropy": loss if loss != "auto" else "chunked",
        "path": None,
        "row_tokens": None,
        "device": gpus[0] if gpus else "cpu",
        "device_bytes": None,
    }


def _registries() -> Any:
    from distft.catalog import REGISTRIES

    return REGISTRIES


def state_bytes(held: dict[str, int]) -> int:
    """Return all of one rank's state, at the end of a backward pass."""
    return sum(held[f"{name}_bytes"] for name in STATE if name != "pageable")


def peak_bytes(record: dict[str, Any]) -> int:
    """Return the most bytes of tensors on the rank that had most.

    On a GPU the allocator's; on a CPU what exists between two steps, and what one more step put on top of it.
    """
    ranks = record["ranks"]
    if ranks[0]["device"]["allocated_bytes"] is not None:
        return max(rank["device"]["allocated_bytes"] for rank in ranks)
    return max(rank["tensors_bytes"] + rank["tensor_growth_bytes"] for rank in ranks)


def planned_peak(record: dict[str, Any]) -> int | None:
    """Return the prediction of `peak_bytes`: of all phases on a GPU, of a later step on a CPU."""
    planned = record.get("planned")
    if not planned:
        return None
    if record["outcome"] == "measured" and record["ranks"][0]["device"]["allocated_bytes"] is not None:
        return max(planned["tensors"].values())
    return planned["tensors"]["steady_step"]
