"""The command line of the step, and that a signal reaches it whenever it comes."""

import os
import sys
import time
from pathlib import Path

from distft.cluster import step
from distft.cluster.slurm import Allocation

TWO = Allocation(
    job="7", restart=0, nodes=("n1", "n2"), per_node=8, gpus_per_node=8, cpus_per_node=96, partition="p"
)  # fmt: skip
TRAIN = ("r.toml", "--set", "seed=1")


def test_srun_starts_one_task_per_process() -> None:
    command = step.command("srun", TWO, 2, TRAIN, 20000)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"]
    assert "--kill-on-bad-exit=1" in command
    assert command[-6:] == [sys.executable, "-m", "distft.train", *TRAIN]
    assert 'trap "" USR1' in command[command.index("-c") + 1]


def test_torchrun_is_one_task_per_node() -> None:
    command = step.command("torchrun", TWO, 2, TRAIN, 20000)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"]
    assert command[-4:] == ["distft.train", *TRAIN]
    torchrun = command[command.index("torch.distributed.run") : -5]
    assert torchrun[1:] == [
        *("--nnodes", "2", "--nproc-per-node", "8", "--master-addr", "n1", "--master-port", "20000")
    ]


def test_fewer_nodes_than_were_given() -> None:
    assert step.command("srun", TWO, 1, TRAIN, 20000)[1:3] == ["--nodes=1", "--ntasks=8"]


def test_more_processes_than_cpus_are_allowed_where_that_is_so() -> None:
    poor = Allocation(**vars(TWO) | {"cpus_per_node": 4})
    assert "--overcommit" in step.command("srun", poor, 2, TRAIN, 20000)
    assert "--overcommit" not in step.command("srun", TWO, 2, TRAIN, 20000)


def test_every_process_sees_all_gpus_of_its_node() -> None:
    env = step.environment({"SLURM_GPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}, TWO, 20000)
    assert 0 <= time.time() - int(env.pop("DISTFT_JOB_START")) < 3600, "when this process was started"
    assert env == {"SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "MASTER_PORT": "20000", "OMP_NUM_THREADS": "12"}
    assert step.environment({"OMP_NUM_THREADS": "2"}, TWO, 20000)["OMP_NUM_THREADS"] == "2"


WAITS = """
import signal, time
time.sleep(0.3)  # as slow to get ready as srun
signal.signal(signal.SIGUSR1, lambda *_: print("asked", flush=True))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(3)
"""


def test_a_wish_is_not_lost_however_early_and_is_repeated_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"import sys; sys.stdout = open({str(out)!r}, 'a')\n{WAITS}"
    running = step.Step([sys.executable, "-c", script], os.environ, again_s=1.0)
    running.ask_to_stop()
    until = time.monotonic() + 60
    while (status := running.poll(0.1)) is None:
        assert time.monotonic() < until
    assert status == 0, "a signal before there was a handler would have killed it"
    assert out.read_text() == "asked\nasked\n"
