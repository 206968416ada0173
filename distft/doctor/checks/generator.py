"""Whether the server that a recipe's answers come from is there, and can be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distft.core.errors import MachineError
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, ok
from distft.generation import GENERATORS
from distft.recipe import listed_params


def look(here: Here) -> Facts:
    """Ask from the process that will speak with it, the first one; nothing where no recipe names a server."""
    recipe = here.options.recipe
    if recipe is None or here.rank != 0 or not recipe.objective.spec.writes:
        return {}
    chosen: Any = recipe.rollout.generator
    spec = GENERATORS[chosen["name"]]
    if spec.look is None:
        return {}
    try:
        return {"says": spec.look(listed_params(chosen, spec.params), recipe.method.spec)}
    except MachineError as error:
        return {"fails": str(error)}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Report what the server said."""
    facts = seen[0].facts
    if "fails" in facts:
        message, _, fix = str(facts["fails"]).partition("  ")
        yield fail(message, fix)
    else:
        yield ok(str(facts.get("says", "answers come from no server")))


# Not before every job: a run waits for its server, which may be another job that starts meanwhile.
CHECK = Check(name="generator", look=look, judge=judge, short=False)
