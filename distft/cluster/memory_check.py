"""Nothing is queued for hours that the plan says cannot fit: asked before sbatch, where the site names its GPU."""

from __future__ import annotations

from collections.abc import Sequence

from distft.core.errors import Problem, RecipeError
from distft.recipe import Recipe

SHOWN = 4
"""Changes that make it fit, of those the planner finds."""


def refuse_what_cannot_fit(
    recipe: Recipe, path: str, overrides: Sequence[str], *, gpu: str, gpus_per_node: int, nodes: str
) -> str:
    """Plan the recipe on the fewest nodes it may get, where a rank holds most.

    Returns:
        What was found, for a person.

    Raises:
        RecipeError: it does not fit; lists what to change. Or the GPU is not in the catalogue.
    """
    from distft.plan.machine import read_machine
    from distft.plan.planner import Planner
    from distft.plan.source import config_folder

    fewest = int(nodes.partition("-")[0])
    machine = read_machine(gpu, gpus_per_node, fewest)
    try:
        with config_folder(recipe, None) as folder:
            planner = Planner(path=path, overrides=overrides, folder=folder, machine=machine)
            case = planner.case()
            changes = [] if case.fits else planner.changes(case)[:SHOWN]
    except RecipeError as error:
        if not any("has no config.json" in problem.message for problem in error.problems):
            raise
        return "not planned: the model's config.json is not on this machine"
    peak, has = case.memory.peak / 2**30, machine.gpu.memory_gib
    summary = f"{peak:.1f} GiB of {has:.1f} on each of {machine.world} {machine.gpu.name} (predicted)"
    if case.fits:
        return f"fits: {summary}"
    ways = "\n".join(f"    {change}" for change in changes)
    raise RecipeError(
        path,
        [Problem(message=f"does not fit: {summary}", fix=f"what does, cheapest first:\n{ways}" if ways else "")],
    )
