"""The batch script that `distft submit` writes: cluster/train.sbatch with a site's settings and the run's arguments."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.cluster.site import Site


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What is asked of the scheduler."""

    name: str
    nodes: str
    """A number, or a range "2-8"."""
    gpus_per_node: int
    """0: one process on each node, on its CPUs."""
    time: str | None
    """As Slurm writes it, "1-12:00:00"; None: the partition's own limit."""
    partition: str | None
    """None: the site's."""
    output_dir: Path
    """Where the job's output goes; one file over all restarts."""
    chain: bool = False
    """One of several jobs in a row, for queues that do not requeue."""
    after: str | None = None
    """The job before this one in its chain."""


def render(site: Site, wanted: SlurmRequest, *trains: Sequence[str]) -> str:
    """Return a whole batch script; each of `trains` is a recipe and distft.train's options, several are an array."""
    cpus = site.cpus_per_gpu * max(1, wanted.gpus_per_node)
    partition = wanted.partition or site.partition
    options = [
        f"--job-name={wanted.name}",
        f"--nodes={wanted.nodes}",
        "--ntasks-per-node=1",  # the step inside decides how many processes share a node
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={wanted.gpus_per_node}"] if wanted.gpus_per_node else []),
        *([f"--time={wanted.time}"] if wanted.time else []),
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={site.account}"] if site.account else []),
        *([f"--array=0-{len(trains) - 1}"] if len(trains) > 1 else []),
        f"--output={wanted.output_dir.absolute()}/{output_name('%A_%a' if len(trains) > 1 else '%j')}",
        "--open-mode=append",
        "--no-requeue" if wanted.chain else "--requeue",
        *([f"--dependency=afterany:{wanted.after}"] if wanted.after else []),
        f"--signal=B:USR1@{site.notice_s}",
        *site.sbatch,
    ]
    batch = [
        *("exec", site.python or sys.executable, "-m", "distft.cluster.batch", "--launcher", site.launcher),
        *("--max-stalled-restarts", str(site.max_stalled_restarts)),
        *([] if site.doctor else ["--no-doctor"]),
        *_given("--link-floor", site.link_floor_gb_per_s),
        *_given("--disk-floor", site.disk_floor_gb_per_s),
        *(["--chain"] if wanted.chain else []),
        *(["--after", wanted.after] if wanted.after else []),
    ]
    lines = [
        "#!/usr/bin/env bash",
        "# Written by distft submit; cluster/train.sbatch explains what such a job does.",
        *(f"#SBATCH {option if _plain(option) else shlex.quote(option)}" for option in options),
        'trap "" USR1',
    ]
    if site.setup:
        lines += ["# shellcheck source=/dev/null", "{", *(f"  {line}" for line in site.setup), "}"]
    exports = [f"export {key}={_in_double_quotes(value)}" for key, value in site.exports().items()]
    if any("$" in line for line in exports):  # "$SLURM_TMPDIR/hf" where nobody sets it is not /hf
        exports = ["set -u", *exports, "set +u"]
    lines += exports
    if len(trains) == 1:
        lines.append(shlex.join([*batch, *trains[0]]))
    else:
        cases = [f"  {number}) set -- {shlex.join(train)} ;;" for number, train in enumerate(trains)]
        lines += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", f'{shlex.join(batch)} "$@"']
    return "\n".join(lines) + "\n"


def output_name(job: str) -> str:
    """Return the file of a job's output."""
    return f"job-{job}.out"


def _given(option: str, value: float | None) -> list[str]:
    return [] if value is None else [option, f"{value:g}"]


def _plain(option: str) -> bool:
    return not any(char in option for char in " \t\"'\\")


def _in_double_quotes(value: str) -> str:
    """Quote a text so that variables are expanded on the node, and nothing else is."""
    for char in ("\\", '"', "`"):
        value = value.replace(char, f"\\{char}")
    return f'"{value.replace("$(", chr(92) + "$(")}"'
