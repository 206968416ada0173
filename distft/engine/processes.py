"""The processes of this run: who we are, on which device, and the group we talk in.

Started by `accelerate launch`, `torchrun` or `srun`, one process per accelerator; each leaves its mark in the
environment. The group is made here and not by a library, because a library that guesses guesses silently:
accelerate turns DeepSpeed into DDP when told to use the CPU, DeepSpeed starts one world per rank without a backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError
from distft.core.hard_exit import keep_alive
from distft.engine import affinity, flight_recorder

if TYPE_CHECKING:
    import torch

FILES, FILES_PER_RANK = 1024, 8
"""Open files for everything else, and for each rank's connections."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """One process's place among all."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    launcher: str
    """accelerate | torchrun | slurm | plain; what the environment says started us."""
    wants: str
    """What the launcher was told to use: "zero1" to "zero3", "deepspeed", "fsdp", or "" when it left that open."""
    wants_offload: bool = False
    """It was told to keep optimizer state in host memory."""
    joined: bool
    """This call made the process group, so whoever made the call leaves it; False: the caller's caller owns it."""
    local_world: int | None = None
    """Processes of each node, where the launcher says so and all nodes have as many."""
    exported: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """Environment variables that `join` set, with the values that `leave` gives back: a second run here starts as
    the first."""


def detect_launcher(env: Mapping[str, str]) -> tuple[str, int, int, int]:
    """Return (launcher, rank, world, local rank) from the environment that a launcher left.

    Raises:
        MachineError: the environment names a world without saying which rank this is.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing:
            raise MachineError(
                f"the launcher set {'RANK' if 'RANK' in env else 'WORLD_SIZE'} but not {', '.join(missing)}; "
                "start with accelerate launch, torchrun or srun, or unset it to run one process"
            )
        launcher = "accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "torchrun"
        return launcher, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise MachineError(
                "srun started several tasks but MASTER_ADDR and MASTER_PORT are not set; "
                'export MASTER_ADDR="$(scontrol show hostnames | head -n 1)" MASTER_PORT=29500 in the batch script'
            )
        return "slurm", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return "plain", 0, 1, 0


def neighbours(env: Mapping[str, str], rank: int, world: int, local_rank: int) -> Sequence[int]:
    """Return the ranks that may run on this machine: the launcher's block of them, or all of a small world."""
    size = int(env["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in env else per_node(env, world)
    if size is not None:
        return range(rank - local_rank, rank - local_rank + size)
    return range(world) if world <= 64 else ()


def per_node(env: Mapping[str, str], world: int) -> int | None:
    """Return the processes of each node; None where the environment does not say, or nodes differ."""
    if "LOCAL_WORLD_SIZE" in env:
        size = int(env["LOCAL_WORLD_SIZE"])
    elif equal := re.fullmatch(r"(\d+)(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        size = int(equal[1])
    else:
        return 1 if world == 1 else None
    return size if world % size == 0 else None


def launcher_wants(env: Mapping[str, str]) -> str:
    """Return the engine, or its family, that `accelerate launch` was configured for, if any."""
    if _is_set(env, "ACCELERATE_USE_DEEPSPEED"):
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return f"zero{stage}" if stage in ("1", "2", "3") else "deepspeed"
    return "fsdp" if _is_set(env, "ACCELERATE_USE_FSDP") else ""


def launcher_offloads(env: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` was configured to keep optimizer state in host memory."""
    return _is_set(env, "ACCELERATE_USE_DEEPSPEED") and (
        env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")
    )


def _is_set(env: Mapping[str, str], key: str) -> bool:
    return env.get(key, "").lower() in ("true", "1")


def join(timeout_s: float = 1800.0, *, store: Any = None, record_in: Path | None = None) -> Processes:
    """Find our place, take our device and enter the process group (gloo beside NCCL, so host numbers need no GPU).

    Args:
        timeout_s: of the rendezvous, and of every collective after it.
        store: where processes that have met already go on; None: at MASTER_ADDR and MASTER_PORT.
        record_in: folder for the last collectives of each rank, should one of them never end (see `flight_recorder`).

    Raises:
        MachineError: more processes on this host than accelerators, or the rendezvous failed.
    """
    import torch
    import torch.distributed as dist

    launcher, rank, world, local_rank = detect_launcher(os.environ)
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        affinity.bind(torch.cuda.get_device_properties(device))
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    joined = not dist.is_initialized()
    exported: dict[str, str | None] = {}
    if joined:
        # Libraries (DeepSpeed) read these even when the group exists already, and LOCAL_RANK as a device's number.
        ours = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(device.index or 0)}
        if device.type == "cpu":
            ours["LOCAL_RANK"] = str(local_rank)
        if launcher == "plain":  # a whole launch, so that `detect_launcher` reads it back; nobody dials the port
            ours |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        if record_in is not None and world > 1:
            ours |= flight_recorder.variables(record_in, os.environ)
        if device.type == "cuda":
            ours |= nccl_variables(timeout_s, os.environ)
        exported = {key: os.environ.get(key) for key in ours if os.environ.get(key) != ours[key]}
        os.environ.update(ours)
        timeout = timedelta(seconds=timeout_s)
        allow_files(world)
        try:
            if launcher == "plain":
                alone: Any = dist.HashStore()  # type: ignore[reportPrivateImportUsage]  # no port for one process
                dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
            else:
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        except (dist.DistError, RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise MachineError(
                f"rank {rank} of {world} could not join the process group at {address}: {error}"
            ) from error
        if device.type == "cuda" and world > 1:
            refuse_shared_gpus(_gpus_of_all(rank, world, device))
    return Processes(
        rank=rank,
        world=world,
        local_rank=local_rank,
        device=device,
        launcher=launcher,
        wants=launcher_wants(os.environ),
        wants_offload=launcher_offloads(os.environ),
        joined=joined,
        local_world=per_node(os.environ, world),
        exported=exported,
    )


def gpu_of(local_rank: int, visible: int) -> int:
    """Return the index of this process's GPU among those that it sees.

    A process that sees one GPU has been given it: `srun --gpus-per-task=1` shows each task its own as number 0.
    Whether two were given the same one is known when all have met (`refuse_shared_gpus`).

    Raises:
        MachineError: several GPUs are visible, and fewer than processes.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise MachineError(
            f"process {local_rank} of this host has no GPU: {visible} visible; start {visible} processes per host"
        )
    return local_rank


def refuse_shared_gpus(gpus: Sequence[tuple[int, int]]) -> None:
    """Check that no two processes use the same GPU.

    Args:
        gpus: of every rank, what identifies its host and its GPU.

    Raises:
        MachineError: two do.
    """
    first: dict[tuple[int, int], int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu in first:
            raise MachineError(
                f"ranks {first[gpu]} and {rank} use the same GPU: more processes than GPUs were started on their "
                "host, or both see the same one alone; start one process per GPU"
            )
        first[gpu] = rank


def _gpus_of_all(rank: int, world: int, device: torch.device) -> list[tuple[int, int]]:
    """Return what identifies every rank's host and GPU; collective, over gloo (objects would go over NCCL)."""
    import torch
    import torch.distributed as dist

    texts = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    hashes = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in texts]
    of_all = torch.zeros(world, 2, dtype=torch.int64)
    of_all[rank] = torch.tensor(hashes)
    dist.all_reduce(of_all)
    return [(int(host), int(gpu)) for host, gpu in of_all]


HEARTBEAT_BEYOND_S = 600
"""How much longer than our own timeouts NCCL's heartbeat monitor waits."""


def nccl_variables(timeout_s: float, env: Mapping[str, str]) -> dict[str, str]:
    """Return what NCCL's process group reads from the environment; what is there already counts more.

    Its heartbeat monitor kills a process whose NCCL watchdog has been stuck for 480 s: before our watch, which has
    `timeout_s` at most and names the rank to blame, has come to its verdict.

    Args:
        timeout_s: of collectives.
        env: the environment as it is.
    """
    name = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
    return {} if name in env else {name: str(int(timeout_s) + HEARTBEAT_BEYOND_S)}


def allow_files(world: int) -> None:
    """Raise the soft limit of open files towards what a run of this size opens, as far as the hard one lets us.

    Every gloo group holds a connection to each of its ranks in each process (world + 3 descriptors measured), the store
    two for each on rank 0: two groups of 512 do not fit the usual 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES + FILES_PER_RANK * world
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def leaving() -> Iterator[contextlib.ExitStack]:
    """Yield a stack for what leaves the process group; run at the end, but not where that waits for peers in vain.

    Destroying an NCCL communicator (and aborting one) waits for the other ranks, and when this one has failed alone
    they wait in a collective for it. So on accelerators it is left to the end of the process; the others find the
    reason in exit.json, which is to be written inside.
    Sources: https://github.com/pytorch/pytorch/pull/119250, https://github.com/NVIDIA/nccl/issues/1777
    """
    stack = contextlib.ExitStack()
    try:
        yield stack
    except BaseException:
        if _shares_accelerators():
            keep_alive(stack.pop_all())
        else:
            stack.close()
        raise
    stack.close()


def _shares_accelerators() -> bool:
    if "torch" not in sys.modules:  # a run that ends before it has joined waits for no import
        return False
    import torch
    import torch.distributed as dist

    return torch.cuda.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave(processes: Processes) -> None:
    """Leave the process group if `join` made it."""
    import torch.distributed as dist

    if processes.joined and dist.is_initialized():
        dist.destroy_process_group()
    for key, before in processes.exported.items():
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before
