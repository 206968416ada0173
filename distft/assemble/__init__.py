"""Each part of a run made from its table of the recipe, for `distft.job` to put together in order."""

from distft.assemble.answers import best, exams, looks, renderer
from distft.assemble.keeping import checkpoints, export, saved_shapes
from distft.assemble.origins import remember
from distft.assemble.parts import (
    adopt,
    device_name,
    fetch,
    manifest,
    meters,
    model,
    objective,
    open_engine,
    run_facts,
    update_rule,
)
from distft.assemble.rows import Data, HeldOut, Say, data, dated, held_out
from distft.assemble.sizes import Layout, advice, agreed, layout, on_all, planned, worst

__all__ = [
    "Data",
    "HeldOut",
    "Layout",
    "Say",
    "adopt",
    "advice",
    "agreed",
    "best",
    "checkpoints",
    "data",
    "dated",
    "device_name",
    "exams",
    "export",
    "fetch",
    "held_out",
    "layout",
    "looks",
    "manifest",
    "meters",
    "model",
    "objective",
    "on_all",
    "open_engine",
    "planned",
    "remember",
    "renderer",
    "run_facts",
    "saved_shapes",
    "update_rule",
    "worst",
]
