"""How many processes there are, and whether a recipe can be run by so many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from distft.core.errors import RecipeError
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, odd_ones, ok, warn


def look(here: Here) -> Facts:
    """Return what the launcher said."""
    return {"world": here.world, "nodes": int(here.env.get("SLURM_JOB_NUM_NODES", "0"))}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether all hosts have the same number of processes, and the global batch splits over them."""
    hosts = Counter(process.host for process in seen)
    world, per_host = len(seen), options.per_host or max(hosts.values())
    usual, others = odd_ones(seen, lambda process: process.facts["world"])
    if others:
        yield fail(
            f"{names(process.who for process in others)} was started for {others[0].facts['world']} processes, "
            f"others {usual}",
            "give every machine the same --num_processes (accelerate) or --nnodes and --nproc-per-node (torchrun)",
            (process.host for process in others),
        )
    if len(set(hosts.values())) > 1:
        fewest = min(hosts, key=hosts.__getitem__)
        yield warn(
            f"{hosts[fewest]} processes on {fewest}, {max(hosts.values())} on others",
            "start as many on every host: gradients wait for the slowest",
        )
    if seen[0].facts["nodes"] > len(hosts):
        yield warn(
            f"the job has {seen[0].facts['nodes']} nodes, the processes are on {len(hosts)}",
            "srun without --nodes and --ntasks uses one: cluster/train.sbatch says both",
        )
    if options.recipe is not None:
        from distft.recipe import check_world

        try:
            check_world(options.recipe, len(hosts) * per_host if options.per_host else world)
        except RecipeError as error:
            problem = error.problems[0]
            yield fail(problem.message, problem.fix)
    noun, on = ("process", "host") if world == 1 else ("processes", "host" if len(hosts) == 1 else "hosts")
    yield ok(f"{world} {noun} on {len(hosts)} {on} ({names(hosts)})")


CHECK = Check(name="processes", look=look, judge=judge)
