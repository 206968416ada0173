"""Every launch file in turn, without its imports: one process has accelerate, and forks a launcher for each.

What is launched only says where it finds itself (`say` below): `FOLDER/NAME.RANK.json`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def say(folder: str, name: str) -> None:
    """In a launched process: what it can tell of its launch."""
    from distft.engine.processes import detect_launcher, launcher_offloads, launcher_wants

    launcher, rank, world, local_rank = detect_launcher(os.environ)
    said = {"launcher": launcher, "world": world, "local_rank": local_rank}
    said |= {"wants": launcher_wants(os.environ), "offloads": launcher_offloads(os.environ)}
    Path(folder, f"{name}.{rank}.json").write_text(json.dumps(said))


def launch_all(folder: str, paths: list[str]) -> dict[str, list[int]]:
    """Exit codes of the launchers of each file, one for each of its machines."""
    import deepspeed  # noqa: F401
    import torch.distributed.run  # noqa: F401
    import yaml
    from accelerate.commands.launch import launch_command, launch_command_parser

    codes = {}
    for path in paths:
        text = yaml.safe_load(Path(path).read_text())
        machines = text["num_machines"]
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        more = [] if text["num_processes"] == 1 else ["--num_processes", "2"]
        if machines > 1:
            more += ["--main_process_ip", "localhost", "--main_process_port", str(port)]
        children = []
        for machine in range(machines):
            own = ["--machine_rank", str(machine)] if machines > 1 else []
            argv = ["--config_file", path, *more, *own, __file__, "say", folder, Path(path).stem]
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    launch_command(launch_command_parser().parse_args(argv))
                    code = 0
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
        codes[Path(path).stem] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return codes


if __name__ == "__main__":
    if sys.argv[1] == "say":
        say(*sys.argv[2:])
    else:
        print(json.dumps(launch_all(sys.argv[2], sys.argv[3:])))
