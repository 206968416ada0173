"""How this machine's processes of the main job are started from another command.

`python -m distft.launch COMMAND...` is what `distft train` becomes: it stays until the last process has ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from distft.core import supervise
from distft.core.command_line import without
from distft.core.errors import Preempted, Problem, RecipeError
from distft.core.stop import STOP, hold
from distft.train_options import parser


def launch_command(nproc: int, arguments: list[str], *, module: str = "distft.train") -> list[str]:
    """Return the command line that starts `nproc` processes of the main job, or another module, on this machine."""
    started = ["-m", module, *arguments]
    if nproc == 1:
        return [sys.executable, *started]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(nproc)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, *started]


def launch_env() -> dict[str, str]:
    """Return variables for Accelerate, which refuses --multi_gpu without a GPU unless told to use the CPU."""
    import torch

    return dict(os.environ) | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})


def num_accelerators() -> int:
    """Return the number of processes to start where none is given."""
    import torch

    return max(1, torch.cuda.device_count())


def become(command: Sequence[str], env: Mapping[str, str], *, nproc: int) -> NoReturn:
    """Turn this process into the command: the one rank itself, or the supervisor of several.

    Raises:
        Preempted: a signal that asks to stop has come already.
    """
    hold(True)  # pending signals outlive the exec
    if STOP.reason:
        raise Preempted(f"stopped by {STOP.reason} before any process was started")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    supervised = list(command) if nproc == 1 else [sys.executable, "-m", "distft.launch", *command]
    os.execve(supervised[0], supervised, dict(env))


def start_processes(module: str, argv: Sequence[str], *, nproc: int | None) -> int:
    """Become `nproc` processes of the module, one per GPU if None; returns an exit code only when that is refused."""
    if "LOCAL_RANK" in os.environ:
        message = "--nproc starts processes, and this is one of a launcher's already; leave it out"
        print(RecipeError("the command line", [Problem(message=message)]), file=sys.stderr)
        return RecipeError.exit_code
    nproc = nproc if nproc is not None else num_accelerators()
    try:
        become(launch_command(nproc, without(argv, "--nproc"), module=module), launch_env(), nproc=nproc)
    except Preempted as error:
        print(error, file=sys.stderr)
        return error.exit_code


def start_training(argv: Sequence[str]) -> int:
    """Run `distft train`: read the flags and the recipe, once, then become this machine's processes."""
    options = parser().parse_args(argv)
    from distft import load_recipe
    from distft.compatibility import refuse_missing_folder

    try:
        refuse_missing_folder(load_recipe(options.recipe, overrides=options.overrides))
    except RecipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return start_processes("distft.train", argv, nproc=options.nproc)


if __name__ == "__main__":
    sys.exit(supervise.run(sys.argv[1:], env=os.environ, launcher=True).code)
