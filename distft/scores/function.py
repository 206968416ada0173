"""`function`: a score of the user's own, by `module:function` or by the name of an entry point.

It is called with the answer's text and the row (a dict), and returns a number, true or false; or, with
`figures = ["a", "b"]`, a dict of these. A package offers one to recipes as an entry point of the group "distft.scores".
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import Field

from distft.core.errors import DataError, Problem, RecipeError
from distft.core.registry import Params, nearest
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreSpec, by_row

GROUP = "distft.scores"


class FunctionParams(Params):
    """Which function."""

    function: str = Field(min_length=1, examples=["my_package.scores:polite"])
    """`module:function`, importable where the run starts (PYTHONPATH), or an entry point's name."""
    figures: tuple[str, ...] = ()
    """Keys of the dict it returns; unless set, it returns one number, and the figure is called after the function."""
    higher_is_better: bool = True
    """For all its figures."""
    options: dict[str, Any] = Field(default={})
    """Passed to it as keyword arguments."""


def figures(params: FunctionParams) -> tuple[MetricInfo, ...]:
    """Return the figures as the recipe names them."""
    names = params.figures or (params.function.rpartition(":")[2].rpartition(".")[2],)
    return tuple(MetricInfo(name=name, higher_is_better=params.higher_is_better) for name in names)


def build(params: FunctionParams) -> Scorer:
    """Import it now, so that a mistake is told before anything is generated.

    Raises:
        RecipeError: it cannot be found, or is no function.
    """
    function = find(params.function)
    names = params.figures

    def judge(answer: Answer) -> list[float]:
        try:
            given = function(answer.text, dict(answer.row), **params.options)
        except Exception as error:  # the user's own code: its mistake is told with its place, and ends the scoring
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"{answer.id}: score {params.function} raised {type(error).__name__}: {error}  "
                f"({last.filename}:{last.lineno})"
            ) from error
        if not names:
            return [figure_value(given, answer, params.function)]
        if not isinstance(given, Mapping) or set(given) != set(names):
            shown = f"keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else _shown(given)
            raise DataError(f"{answer.id}: score {params.function} returned {shown}, expected keys {', '.join(names)}")
        return [figure_value(given[name], answer, f"{params.function} {name}") for name in names]

    return by_row(figures(params), judge)


def find(name: str) -> Callable[..., Any]:
    """Import the function called `module:function`, or that of an entry point.

    Raises:
        RecipeError: none of that name can be imported, or what is found cannot be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        by_name = {point.name: point for point in entry_points(group=GROUP)}
        if name not in by_name:
            meant = nearest(name, by_name)
            hint = f'did you mean "{meant}"?  ' if meant else ""
            have = f"entry points here: {', '.join(by_name)}" if by_name else f"no package here offers {GROUP}"
            raise _wrong(name, "no such entry point", f'{hint}write "module:function"; {have}')
        function = _imported(name, by_name[name].load)
    else:
        module = _imported(name, lambda: importlib.import_module(module_name))
        function = getattr(module, function_name, None)
        if function is None:
            meant = nearest(function_name, list(vars(module)))
            raise _wrong(name, f"{module_name} has no {function_name!r}", f'did you mean "{meant}"?' if meant else "")
    if not callable(function):
        raise _wrong(name, f"is {_shown(function)}, not a function", "")
    return function


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a module runs when it is imported, and may fail in any way
        fix = "is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise _wrong(name, f"cannot be imported: {type(error).__name__}: {error}", fix) from error


def figure_value(value: Any, answer: Answer, what: str) -> float:
    """Return what a function gave as a number.

    Raises:
        DataError: it is none that can be reckoned with.
    """
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise DataError(f"{answer.id}: score {what} returned {_shown(value)}, expected a finite number, true or false")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"


def _wrong(name: str, message: str, fix: str) -> RecipeError:
    return RecipeError('score "function"', [Problem(message=f'function = "{name}"  {message}', fix=fix)])


SPEC = ScoreSpec(name="function", params=FunctionParams, figures=figures, build=build)
