"""`distft.train` as on GPUs, where destroying the process group waits for peers for ever: rank 1 fails alone.

usage: torchrun --nproc-per-node 2 tests/dist/ends_worker.py RECIPE [TABLE.KEY=VALUE ...]
"""

import os
import sys
import threading

import torch.distributed as dist

from distft.core.hard_exit import hard_exit
from distft.engine import processes
from distft.engine.solo import SoloEngine
from distft.job import main


def never(*args: object, **options: object) -> None:
    threading.Event().wait()


def full(*args: object, **options: object) -> None:
    raise dist.DistBackendError("NCCL error: unhandled cuda error. Cuda failure 2 'out of memory'")


if __name__ == "__main__":
    processes._shares_accelerators = lambda: True
    dist.destroy_process_group = never
    if os.environ["RANK"] == "1":
        SoloEngine.step = full
    recipe, *settings = sys.argv[1:]
    hard_exit(main([recipe, *(word for setting in settings for word in ("--set", setting))]))
