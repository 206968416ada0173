"""The settings of one cluster, in one small TOML file: what every job there needs and no recipe should know."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params
from distft.recipe.explain import did_you_mean, read_table
from distft.recipe.lines import KeyPath, find_lines
from distft.recipe.origin import Origin, RecipeMistake


class Site(Params):
    """A cluster's settings; all may be left out."""

    partition: str | None = None
    """Where jobs go unless --partition says otherwise."""
    account: str | None = None
    """Who pays."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, each as one word: "--qos=high", "--exclusive"."""
    gpu: str | None = None
    """The cluster's GPU as `distft plan` calls it ("h100-80gb", or its GiB): what cannot fit it is not submitted."""
    cpus_per_gpu: int = Field(default=1, ge=1)
    """CPUs to ask for with each GPU: for data loading, and for the operating system's share."""
    notice_s: int = Field(default=300, ge=1)
    """Seconds between Slurm's warning and the time limit: more than one step and one save take."""
    max_stalled_restarts: int = Field(default=3, ge=0)
    """Restarts in a row that may bring no newer checkpoint."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """One task per process, or one torchrun per node."""
    doctor: bool = True
    """The short form of `distft doctor` before each start on several nodes; a node that fails it is excluded."""
    link_floor_gb_per_s: float | None = Field(default=None, gt=0)
    """Bus bandwidth between nodes below which the doctor sends a job away: half of what good nodes give."""
    disk_floor_gb_per_s: float | None = Field(default=None, gt=0)
    """Write speed of the run folder below which it does."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else: "module load cuda/12.8", "source /shared/venv/bin/activate"."""
    python: str | None = None
    """With distft; looked for after `setup`. None: the one that runs `distft submit`, in a folder that nodes see."""
    interface: str | None = None
    """Network interface on which processes find each other (gloo, and NCCL's bootstrap): "ib0"."""
    hf_home: str | None = None
    """Cache of models and datasets from the hub; one process for each cache fetches, the others wait. On a node's own
    disk ("$SLURM_TMPDIR/hf") that is one a node. Variables are expanded on the job's first node, and must be set."""
    distft_cache: str | None = None
    """Cache of prepared rows, likewise: a folder that all nodes see, unless each is to prepare its own."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the processes: NCCL_IB_HCA and the like."""

    def exports(self) -> dict[str, str]:
        """Return every variable that a job here sets."""
        named = {
            "NCCL_SOCKET_IFNAME": self.interface,
            "GLOO_SOCKET_IFNAME": self.interface,
            "HF_HOME": self.hf_home,
            "DISTFT_CACHE": self.distft_cache,
        }
        return {key: value for key, value in named.items() if value is not None} | self.env


def read_site(path: Path) -> Site:
    """Read the settings of a site file.

    Raises:
        RecipeError: it cannot be read, or lists every mistake in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError(str(path), [Problem(message=f"cannot be read: {error}")]) from None
    origin = Origin(raw=raw, lines=find_lines(text), overrides={})
    site, faults = read_table(Site, raw, (), _unknown)
    if faults:
        raise RecipeError(str(path), [origin.problem(fault) for fault in faults])
    return site


def _unknown(key: KeyPath, allowed: list[str]) -> RecipeMistake:
    return RecipeMistake(
        key=key, message=f"unknown setting{did_you_mean(key[-1], allowed)}", fix=f"allowed: {', '.join(allowed)}"
    )
