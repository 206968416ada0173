"""`auto`: the engine an expert would pick for this method, these processes and these libraries, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from distft.core.errors import MachineError
from distft.engine.processes import Processes
from distft.engine.spec import EngineSpec


def choose(
    name: str,
    engines: Mapping[str, EngineSpec],
    processes: Processes,
    *,
    trains_all: bool,
    elementwise: bool,
    offload: str = "none",
) -> tuple[str, str]:
    """Return (engine name, reason) for a recipe that says `name`.

    `trains_all`: every weight is trained, so optimizer state dominates memory and is worth sharding.
    `elementwise`: the optimizer can work on pieces of tensors.

    Raises:
        MachineError: the launcher was configured for another engine than the recipe names, the engine's library or
            world size is not there, or the engine left to choose cannot do what optimizer or offload need.
    """
    if name != "auto":
        _check_launcher(name, processes.wants)
        chosen, reason = name, "the recipe names it"
    elif processes.wants:
        chosen = {"deepspeed": "zero3", "fsdp": "fsdp2"}.get(processes.wants, processes.wants)
        reason = f"accelerate launch was configured for {processes.wants}"
    elif processes.world == 1 and offload == "none":
        chosen, reason = "solo", "one process"
    elif not elementwise:
        chosen, reason = "ddp", "the optimizer needs whole matrices"
    elif trains_all or offload != "none":
        has_deepspeed = importlib.util.find_spec("deepspeed") is not None
        chosen = "zero3" if has_deepspeed else "fsdp2"
        reason = "all weights are trained, so optimizer state is sharded" if trains_all else "offload was asked for"
        if not has_deepspeed:
            reason += " (DeepSpeed is not installed)"
    else:
        chosen, reason = "ddp", "only adapters are trained: sharding them saves nothing and costs traffic"
    if processes.wants_offload and offload == "none":
        raise MachineError(
            "accelerate launch was configured with an offload_optimizer_device, and the recipe does not offload: "
            'set [engine] offload = "optimizer", or take it out of the launch file'
        )
    spec = engines[chosen]
    if spec.library and importlib.util.find_spec(spec.library) is None:
        raise MachineError(f"engine {chosen} needs {spec.library}, which is not installed: pip install {spec.library}")
    if spec.max_world is not None and processes.world > spec.max_world:
        raise MachineError(
            f"engine {chosen} runs in {spec.max_world} process, {processes.world} were started: "
            'set [engine] name = "auto" or "ddp", or start one process'
        )
    if spec.flattens and not elementwise:
        raise MachineError(
            f"engine {chosen} ({reason}) gives each rank pieces of matrices, and the optimizer needs whole ones: "
            "launch without it, or choose another [optim] name"
        )
    if offload != "none" and offload not in spec.offloads:
        raise MachineError(
            f'engine {chosen} ({reason}) cannot offload = "{offload}": remove it, '
            "or use engine zero3 (optimizer, all) or fsdp2 (all)"
        )
    return chosen, reason


def _check_launcher(name: str, wants: str) -> None:
    """Check the launcher's family; its stage may differ, as a recipe may override the launch file."""
    family = "deepspeed" if name.startswith("zero") else "fsdp" if name == "fsdp2" else ""
    wanted = "deepspeed" if wants.startswith("zero") else wants
    if wanted and wanted != family:
        flag = {"deepspeed": "--use_deepspeed", "fsdp": "--use_fsdp"}[wanted]
        raise MachineError(
            f"accelerate launch was configured with {flag}, but the recipe says [engine] name = {name!r}: "
            f"launch without {flag} (use --multi_gpu), or set the engine to "
            + ("zero1, zero2 or zero3" if wanted == "deepspeed" else "fsdp2")
        )
