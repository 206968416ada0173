"""`python -m distft.adapters ACTION A ...`: adapters combined, looked at, compared, extracted, resized, converted."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distft import adapter_sources
from distft.adapters_options import SETTINGS, parser
from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE, Problem, RecipeError
from distft.core.log import quiet_libraries
from distft.core.registry import Params
from distft.merging import combining, looking, reshaping
from distft.merging.adapter_config import adapter_mistake
from distft.merging.base_model import BaseModel
from distft.merging.combining import CombinedTensor, CombineOptions, CombineReport
from distft.merging.delta_sources import AdapterDeltas, DeltaSource, FileDeltas, ModelDeltas, is_model
from distft.merging.hows import HOWS, HowSpec
from distft.merging.merging import DTYPES

Result = tuple[Any, Iterator[str]]
"""(what --json prints, lines for people)"""
_TAKES = {
    "combine": {"out", "base", "rank", "how", "weights", "whole", "dtype", *SETTINGS},
    "inspect": {"base"},
    "diff": {"base"},
    "extract": {"out", "base", "rank"},
    "resize": {"out", "rank"},
    "convert": {"out", "scale"},
}
_NEEDS = {"combine": ("out", "how"), "extract": ("out", "base", "rank"), "resize": ("out", "rank"), "convert": ("out", "scale")}  # fmt: skip  # noqa: E501
_COUNTS = {"combine": (1, None), "inspect": (1, 1), "diff": (2, 2), "extract": (1, 1), "resize": (1, 1), "convert": (1, 1)}  # fmt: skip  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    quiet_libraries()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there, and it is for the result alone
            _refuse_flags(options)
            raw, lines = _ACTIONS[options.action](options)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, 0)
        return exit_code(error)
    print(json.dumps(raw, indent=1) if options.json else "\n".join(lines))
    return DONE


def _refuse_flags(options: Any) -> None:
    """Refuse flags without an effect on the action, and flags that it lacks.

    Raises:
        RecipeError: all of them.
    """
    action, given = options.action, vars(options)
    flags = {"out", "base", "rank", "how", "weights", "whole", "dtype", *SETTINGS}
    set_ = {
        name for name in flags if given[name] not in (None, False) or (name == "normalize" and given[name] is False)
    }
    problems = [
        Problem(message=f"--{name} has no effect on {action}", fix=f"takes: {_listed(_TAKES[action])}")
        for name in sorted(set_ - _TAKES[action])
    ]
    problems += [
        Problem(message=f"--{name} is missing", fix="see distft adapters --help")
        for name in _NEEDS.get(action, ())
        if name not in set_
    ]
    least, most = _COUNTS[action]
    if len(options.sources) < least or (most is not None and len(options.sources) > most):
        problems.append(Problem(message=f"{len(options.sources)} adapters for {action}", fix=f"it takes {least}"))
    if problems:
        raise RecipeError(f"distft adapters {action}", problems)


def _listed(names: set[str]) -> str:
    return ", ".join(f"--{name}" for name in sorted(names))


# -- combine --------------------------------------------------------------------------------------------------------


def _combine(options: Any) -> Result:
    report = combine_sources(options)
    return report.to_json(), _show_combined(report, options.out)


def combine_sources(options: argparse.Namespace) -> CombineReport:
    """Combine what the flags of `combine` name, and return what was lost.

    Raises:
        RecipeError: something does not fit the base, or the way of combining.
        FileSystemError: it cannot be written.
    """
    how = HOWS[options.how]
    params = how_params(how, {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None})
    if options.weights is not None and not how.takes_weights:
        raise adapter_mistake(
            f"--how {how.name}", "takes no --weights", f"takes: {_listed(set(how.params.model_fields))}"
        )
    weights = tuple(options.weights or [1.0] * len(options.sources))
    places, base, in_4bit = adapter_sources.find_places(options.sources, options.base)
    made = CombineOptions(
        how=how,
        params=params,
        weights=weights,
        rank=options.rank,
        whole=options.whole,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        named_base=options.base,
    )
    return combining.combine(places, base, options.out, made, in_4bit=in_4bit)


def how_params(how: HowSpec, given: dict[str, Any]) -> Params:
    """Return the settings of a way of combining.

    Raises:
        RecipeError: a setting that it does not have, lacks, or out of its range.
    """
    if "scale" in given:
        try:
            given["scale"] = float(given["scale"])
        except ValueError:
            raise adapter_mistake(
                "--scale", f"{given['scale']} is no number", "--scale 1.0 (plain and rslora: convert)"
            ) from None
    try:
        return how.params(**given)
    except ValidationError as error:
        allowed = _listed(set(how.params.model_fields)) or "no settings"
        problems = []
        for each in error.errors():
            flag = f"--{each['loc'][0]}" if each["loc"] else "settings"
            reason = {"missing": "is missing", "extra_forbidden": f"has no effect on {how.name}"}.get(each["type"])
            problems.append(Problem(message=f"{flag} {reason or _reason(each)}", fix=f"{how.name} takes {allowed}"))
        raise RecipeError(f"--how {how.name}", problems) from None


def _reason(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"= {error['input']}: {text[:1].lower()}{text[1:]}" if not isinstance(error["input"], dict) else text


def _show_combined(report: CombineReport, out: Path) -> Iterator[str]:
    yield f"{report.how} of {len(report.sources)}: {out}"
    yield from _table(report.tensors)
    if report.rank:
        yield f"in all: relative error {report.relative_error:.4g} at rank {report.rank}"


def _table(tensors: Sequence[CombinedTensor]) -> Iterator[str]:
    width = max((len(tensor.name) for tensor in tensors), default=6)
    yield f"  {'tensor':<{width}} {'norm':>10} {'rank':>6} {'error':>9}"
    for tensor in tensors:
        rank = str(tensor.rank) if tensor.rank else "whole"
        yield f"  {tensor.name:<{width}} {tensor.norm:>10.4g} {rank:>6} {tensor.relative_error:>9.3g}"


# -- looking --------------------------------------------------------------------------------------------------------


def _opened(text: str, base: str | None) -> tuple[DeltaSource, BaseModel | None]:
    place = adapter_sources.find_place(text)
    if base is None:
        if is_model(place):
            raise adapter_mistake(text, "is a whole model, whose change is known from its base alone", "--base MODEL")
        return FileDeltas(place), None
    folder = adapter_sources.base_folder(base, "--base", None)
    if is_model(place):
        model = BaseModel(folder)
        return ModelDeltas(place, model), model
    from distft.merging.adapter_config import read_adapter_config
    from distft.merging.merging import open_base

    source = adapter_sources.find_source(text, base)
    model = open_base(source, read_adapter_config(place))
    return AdapterDeltas(place, model), model


def _inspect(options: Any) -> Result:
    source, base = _opened(options.sources[0], options.base)
    look = looking.inspect(source, base)
    raw = look.to_json()
    if not isinstance(source, ModelDeltas):
        config = source.adapter.config if isinstance(source, AdapterDeltas | FileDeltas) else None
        assert config is not None
        raw |= {"peft_type": config.kind, "r": config.rank, "alpha": config.alpha, "rslora": config.rslora,
                "dora": config.dora, "base": config.base, "modules_to_save": list(config.modules_to_save)}  # fmt: skip
    return raw, _show_look(look)


def _show_look(look: looking.AdapterLook) -> Iterator[str]:
    width = max((len(tensor.name) for tensor in look.tensors), default=6)
    yield f"{look.label}: {len(look.tensors)} tensors changed, norm of all {look.norm:.4g}"
    yield f"  {'tensor':<{width}} {'norm':>10} {'of base':>8} {'largest':>10} {'rank':>5} {'for 90 %':>8}"
    for tensor in look.tensors:
        cells = (_number(tensor.relative_norm, "8.2%"), _number(tensor.spectral_norm, "10.4g"))
        ranks = (_number(tensor.rank, "5d"), _number(tensor.ranks_for_most, "8d"))
        yield f"  {tensor.name:<{width}} {tensor.norm:>10.4g} {' '.join((*cells, *ranks))}"


def _diff(options: Any) -> Result:
    first, second = (_opened(text, options.base)[0] for text in options.sources)
    found = looking.diff(first, second)
    if not found.tensors:
        raise adapter_mistake(" and ".join(options.sources), "they change no tensor in common", "nothing to compare")
    return found.to_json(), _show_difference(found)


def _show_difference(found: looking.AdapterDifference) -> Iterator[str]:
    width = max((len(tensor.name) for tensor in found.tensors), default=6)
    yield f"{found.labels[0]} (norm {found.norms[0]:.4g}) and {found.labels[1]} (norm {found.norms[1]:.4g})"
    yield f"  {'tensor':<{width}} {'norms':>21} {'cosine':>8} {'outputs':>8} {'inputs':>8} {'signs':>7}"
    for tensor in found.tensors:
        norms = f"{tensor.norms[0]:>10.4g} {tensor.norms[1]:>10.4g}"
        angles = (_number(tensor.cosine, "8.3f"), _number(tensor.overlap_outputs, "8.3f"), _number(tensor.overlap_inputs, "8.3f"))  # fmt: skip  # noqa: E501
        yield f"  {tensor.name:<{width}} {norms} {' '.join(angles)} {tensor.sign_conflicts:>7.1%}"
    yield f"in all: cosine {_number(found.cosine, '.4f')}, different signs in {found.sign_conflicts:.1%} of the entries"
    for label, names in zip(found.labels, found.only_in, strict=True):
        if names:
            yield f"changed by {label} alone: {len(names)} tensors, first {names[0]}"


def _number(value: float | int | None, form: str) -> str:
    width = int("".join(char for char in form.partition(".")[0] if char.isdigit()) or 0)
    return "-".rjust(width) if value is None else format(value, form)


# -- reshaping ------------------------------------------------------------------------------------------------------


def _extract(options: Any) -> Result:
    place = adapter_sources.find_place(options.sources[0])
    if not is_model(place):
        raise adapter_mistake(options.sources[0], "is an adapter already", "distft adapters resize changes its rank")
    base = adapter_sources.base_folder(options.base, "--base", None)
    tensors = reshaping.extract(place, base, options.out, rank=options.rank)
    return _reshaped(tensors), _show_reshaped(tensors, options.out)


def _resize(options: Any) -> Result:
    place = adapter_sources.find_place(options.sources[0])
    tensors = reshaping.resize(place, options.out, rank=options.rank)
    return _reshaped(tensors), _show_reshaped(tensors, options.out)


def _convert(options: Any) -> Result:
    if options.scale not in ("plain", "rslora"):
        raise adapter_mistake("--scale", f"{options.scale} for convert", "allowed: plain, rslora")
    place = adapter_sources.find_place(options.sources[0])
    others = reshaping.convert(place, options.out, scale=options.scale)
    line = f"scale {options.scale}: {options.out}" + (
        f", {len(others)} modules with an alpha of their own" if others else ""
    )
    return {"scale": options.scale, "alpha_of_modules": others}, iter([line])


def _reshaped(tensors: Sequence[CombinedTensor]) -> dict[str, Any]:
    norm, lost = (sum(value**2 for value in values) ** 0.5 for values in (
        [tensor.norm for tensor in tensors], [tensor.lost for tensor in tensors]))  # fmt: skip
    rows = [{"name": tensor.name, "norm": tensor.norm, "rank": tensor.rank, "relative_error": tensor.relative_error}
            for tensor in tensors]  # fmt: skip
    return {"relative_error": lost / norm if norm else 0.0, "tensors": rows}


def _show_reshaped(tensors: Sequence[CombinedTensor], out: Path) -> Iterator[str]:
    yield str(out)
    yield from _table(tensors)
    yield f"in all: relative error {_reshaped(tensors)['relative_error']:.4g}"


_ACTIONS: dict[str, Callable[[Any], Result]] = {
    "combine": _combine,
    "inspect": _inspect,
    "diff": _diff,
    "extract": _extract,
    "resize": _resize,
    "convert": _convert,
}

if __name__ == "__main__":
    sys.exit(main())
