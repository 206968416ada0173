"""Parts from other packages: that all of them can be loaded, and are the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distft.catalog import PLUGINS
from distft.core.errors import RecipeError
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, odd_ones, ok


def look(here: Here) -> Facts:
    """Load them, as reading a recipe does."""
    try:
        return {"plugins": [plugin.to_json() for plugin in PLUGINS.load()], "problems": []}
    except RecipeError as error:
        return {"plugins": [], "problems": [[problem.message, problem.fix] for problem in error.problems]}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Report plugins that fail, which end every command that reads a recipe, or that only some ranks have."""
    usual, others = odd_ones(seen, lambda process: process.facts)
    if others:
        shown = f"{_shown(others[0].facts)} on {names(process.who for process in others)}, {_shown(usual)} on others"
        yield fail(
            shown,
            "the same environment on every host: one on the shared folder, or one container image",
            (process.host for process in others),
        )
    problems = {message: fix for process in seen for message, fix in process.facts["problems"]}
    yield from (fail(message, fix) for message, fix in problems.items())
    if not others and not problems:
        yield ok(_shown(usual))


def _shown(facts: Facts) -> str:
    if facts["problems"]:
        return "plugins that cannot be loaded"
    listed = [
        f"{plugin['distribution']} {plugin['version']} ({', '.join(plugin['parts']) or 'no parts'})"
        for plugin in facts["plugins"]
    ]
    return ", ".join(listed) or "none"


CHECK = Check(name="plugins", look=look, judge=judge)
