"""What artifacts may be asked for, as the registries say it: formats with levels, types, ways of combining."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from distft.catalog import PLUGINS
from distft.core.errors import RecipeError
from distft.core.nearest import nearest
from distft.core.registry import Registry
from distft.export_formats import EXPORT_FORMATS, ExportFormatSpec
from distft.merge_options import DTYPES
from distft.merging.hows import HOWS, HowSpec
from distft.service.errors import ApiError, refuse
from distft.service.wire_artifacts import ArtifactRequest

FIELDS = {"export": ("format", "level"), "merge": ("dtype",), "combine": ("how", "weights", "rank", "settings")}
"""Kind -> the fields of a request that it has."""


def export_formats() -> Registry[ExportFormatSpec]:
    """Return the formats, also those of other packages.

    Raises:
        ApiError: a package that adds parts cannot be loaded: status 503.
    """
    try:
        PLUGINS.load()
    except RecipeError:
        message = "A plugin of this server cannot be loaded; `distft doctor` says which."
        raise ApiError(503, message, code="plugin_error") from None
    return EXPORT_FORMATS


def hows() -> Registry[HowSpec]:
    """Return the ways of combining adapters."""
    return HOWS


def checked_settings(request: ArtifactRequest) -> dict[str, Any]:
    """Return what of a request is of its kind, with the defaults filled in.

    Raises:
        ApiError: it asks for what there is not, or for what has no effect; status 400, naming the field.
    """
    for kind, names in FIELDS.items():
        for name in names:
            if kind != request.kind and getattr(request, name) is not None:
                message = f"{name} has no effect on the kind {request.kind}: it is of {kind}."
                refuse(message, param=name, code="unsupported_parameter")
    if request.kind != "combine" and len(request.models) > 1:
        refuse(f"The kind {request.kind} takes one model.", param="models")
    match request.kind:
        case "export":
            return _of_export(request)
        case "merge":
            if request.dtype is not None and request.dtype not in DTYPES:
                refuse(f"Unknown dtype: {_known(request.dtype, DTYPES)}", param="dtype")
            return {"dtype": request.dtype}
        case "combine":
            return _of_combine(request)


def _of_export(request: ArtifactRequest) -> dict[str, Any]:
    formats = export_formats()
    if request.format is None:
        refuse(f"format is missing. Allowed: {', '.join(formats)}", param="format", code="missing_required_parameter")
    if (spec := formats.get(request.format)) is None:
        refuse(f"Unknown format: {_known(request.format, formats)}", param="format")
    if request.level is not None and not spec.levels:
        refuse(f"The format {spec.name} has no levels.", param="level", code="unsupported_parameter")
    if request.level is not None and request.level not in spec.levels:
        refuse(f"Unknown level of {spec.name}: {_known(request.level, spec.levels)}", param="level")
    if needed := [name for name, field in spec.params.model_fields.items() if field.is_required()]:
        message = f"The format {spec.name} needs settings that this API does not take: {', '.join(needed)}"
        refuse(message, param="format", code="cannot_be_made")
    return {"format": spec.name, "level": request.level or spec.default_level or None}


def _of_combine(request: ArtifactRequest) -> dict[str, Any]:
    count = len(request.models)
    if request.how is None:
        refuse(f"how is missing. Allowed: {', '.join(HOWS)}", param="how", code="missing_required_parameter")
    if (how := HOWS.get(request.how)) is None:
        refuse(f"Unknown way of combining: {_known(request.how, HOWS)}", param="how")
    if count < 2:
        refuse("The kind combine takes two models at least.", param="models")
    if len({*request.models}) < count:
        refuse("A model is named twice.", param="models")
    if how.num_sources not in (None, count):
        refuse(f"{how.name} takes {how.num_sources} models, and {count} are named.", param="models")
    if request.weights is not None and not how.takes_weights:
        refuse(f"{how.name} takes no weights.", param="weights", code="unsupported_parameter")
    if request.weights is not None and len(request.weights) != count:
        refuse(f"{len(request.weights)} weights for {count} models.", param="weights")
    if not all(map(math.isfinite, request.weights or ())):
        refuse("A weight is a finite number.", param="weights")
    if request.rank is not None and how.keeps_ranks:
        message = f"{how.name} keeps the sum of the ranks: rank has no effect."
        refuse(message, param="rank", code="unsupported_parameter")
    weights = (request.weights or [1.0] * count) if how.takes_weights else None
    return {"how": how.name, "weights": weights, "rank": request.rank, "settings": _settings(how, request)}


def _settings(how: HowSpec, request: ArtifactRequest) -> dict[str, Any]:
    """Return every setting of a way of combining.

    Raises:
        ApiError: one is unknown, missing or out of its range.
    """
    try:
        return how.params(**(request.settings or {})).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["settings", *map(str, first["loc"])])
        allowed = ", ".join(how.params.model_fields) or "nothing"
        match first["type"]:
            case "extra_forbidden":
                message = f"{how.name} has no such setting. It takes: {allowed}"
            case "missing":
                message = f"{how.name} needs this setting."
            case _:
                message = f"{first['msg']}."
        raise ApiError(400, message, param=name, code="invalid_value") from None


def _known(name: str, allowed: Any) -> str:
    meant = nearest(name, list(allowed))
    return f"{name}. " + (f"Did you mean {meant}? " if meant else "") + f"Allowed: {', '.join(allowed)}"
