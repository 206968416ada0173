"""The runners that `--runner` may name: one file each, and one line here."""

from distft.core.registry import Registry
from distft.service import local_runner, slurm_runner
from distft.service.runner import RunnerSpec

RUNNERS: Registry[RunnerSpec] = Registry("runner")
RUNNERS.add(local_runner.SPEC)
RUNNERS.add(slurm_runner.SPEC)
