"""How this machine's processes of the main job are started from another command.

`python -m distft.launch COMMAND...` is what `distft train` becomes: it stays until the last process has ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from distft.core import supervise
from distft.core.stop import hold


def launch_command(nproc: int, arguments: list[str], *, module: str = "distft.train") -> list[str]:
    """The command line that starts `nproc` processes of the main job, or another module, on this machine."""
    started = ["-m", module, *arguments]
    if nproc == 1:
        return [sys.executable, *started]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(nproc)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, *started]


def launch_env() -> dict[str, str]:
    """Accelerate refuses --multi_gpu without a GPU unless told to use the CPU; our engines do not read this."""
    import torch

    return dict(os.environ) | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})


def num_accelerators() -> int:
    """Processes to start where nobody says how many."""
    import torch

    return max(1, torch.cuda.device_count())


def become(command: Sequence[str], env: Mapping[str, str], *, nproc: int) -> NoReturn:
    """Turn this process into the command: the one rank itself, or the supervisor of several."""
    hold(True)  # pending signals outlive the exec
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    supervised = list(command) if nproc == 1 else [sys.executable, "-m", "distft.launch", *command]
    os.execve(supervised[0], supervised, dict(env))


if __name__ == "__main__":
    sys.exit(supervise.run(sys.argv[1:], env=os.environ, launcher=True).code)
