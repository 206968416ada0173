"""Who we are among all processes, from what each launcher leaves in the environment."""

import os

import pytest
import torch.distributed as dist

from distft.core.errors import MachineError
from distft.engine import processes
from distft.engine.processes import detect_launcher, launcher_wants

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, ("plain", 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}, ("accelerate", 3, 8, 1)),
        (SLURM, ("slurm", 5, 16, 1)),
        (SLURM | TORCHRUN, ("torchrun", 3, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ("plain", 0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "ACCELERATE_MIXED_PRECISION": "no"}, ("plain", 0, 1, 0)),
    ],
    ids=["nothing", "torchrun", "accelerate", "srun", "torchrun-in-slurm", "one-task", "batch-script"],
)
def test_each_launchers_mark(env: dict[str, str], place: tuple[str, int, int, int]) -> None:
    assert detect_launcher(env) == place


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_a_launch_is_refused(missing: str) -> None:
    env = {key: value for key, value in TORCHRUN.items() if key != missing}
    said = "WORLD_SIZE" if missing == "RANK" else "RANK"
    with pytest.raises(MachineError, match=f"the launcher set {said} but not {missing}; start with accelerate launch"):
        detect_launcher(env)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(
        MachineError, match="set RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;"
    ) as said:
        detect_launcher({"RANK": "0"})
    assert said.value.exit_code == 9


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_srun_without_a_meeting_place_says_what_to_export(missing: str) -> None:
    env = {key: value for key, value in SLURM.items() if key != missing}
    with pytest.raises(MachineError, match=r"MASTER_ADDR and MASTER_PORT are not set; export MASTER_ADDR=.*scontrol"):
        detect_launcher(env)


@pytest.mark.parametrize(
    ("env", "family"),
    [
        ({}, ""),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ""),
        ({"ACCELERATE_USE_FSDP": "1"}, "fsdp"),
        ({"ACCELERATE_USE_FSDP": "True"}, "fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false"}, ""),
    ],
    ids=str,
)
def test_what_accelerate_was_configured_for(env: dict[str, str], family: str) -> None:
    assert launcher_wants(env) == family


def test_one_process_joins_and_leaves_without_a_trace() -> None:
    """A second run in the same Python process finds the environment, and the group, as the first one did."""
    before = dict(os.environ)
    placed = processes.join()
    assert (placed.launcher, placed.rank, placed.world, placed.joined) == ("plain", 0, 1, True)
    assert dist.is_initialized()
    inner = processes.join()
    assert not inner.joined, "the group belongs to whoever made it"
    processes.leave(inner)
    assert dist.is_initialized()
    processes.leave(placed)
    assert not dist.is_initialized()
    changed = {key for key, value in os.environ.items() if before.get(key) != value}
    assert changed <= {"DS_ACCELERATOR"}
