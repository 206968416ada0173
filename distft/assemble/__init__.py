"""Each part of a run made from its table of the recipe, for `distft.job` to put together in order."""

from distft.assemble.batch_layout import Layout, advice, agreed, largest_micro_batch, layout, on_all, planned
from distft.assemble.checkpoints import export, open_checkpoints, saved_shapes
from distft.assemble.components import (
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
from distft.assemble.evaluation import best, eval_sets, evaluator, renderer
from distft.assemble.input_hashes import remember
from distft.assemble.training_data import Data, HeldOut, Say, data, dated, held_out

__all__ = [
    "Data",
    "HeldOut",
    "Layout",
    "Say",
    "adopt",
    "advice",
    "agreed",
    "best",
    "data",
    "dated",
    "device_name",
    "eval_sets",
    "evaluator",
    "export",
    "fetch",
    "held_out",
    "largest_micro_batch",
    "layout",
    "manifest",
    "meters",
    "model",
    "objective",
    "on_all",
    "open_checkpoints",
    "open_engine",
    "planned",
    "remember",
    "renderer",
    "run_facts",
    "saved_shapes",
    "update_rule",
]
