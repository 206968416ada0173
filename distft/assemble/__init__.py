"""Each part of a run made from its table of the recipe, for `distft.job` to put together in order."""

from distft.assemble.batch_layout import (
    Layout,
    agree_on_all_ranks,
    agree_on_layout,
    choose_layout,
    largest_micro_batch,
    memory_advice,
    plan_of_run,
)
from distft.assemble.checkpoints import export, open_checkpoints, saved_shapes
from distft.assemble.components import (
    build_meters,
    build_model,
    build_objective,
    device_name,
    fetch_model,
    manifest,
    open_engine,
    refuse_other_policy,
    run_facts,
    set_up_engine,
    update_rule,
)
from distft.assemble.evaluation import build_best_tracker, build_eval_sets, build_evaluator, load_row_renderer
from distft.assemble.frozen_model import freeze
from distft.assemble.input_hashes import hash_inputs
from distft.assemble.reference import compute_other_reference
from distft.assemble.row_start import find_row_start, with_start_of
from distft.assemble.step_source import num_steps, open_step_source
from distft.assemble.teacher import open_teacher
from distft.assemble.training_data import Data, HeldOut, Say, load_data, load_held_out, with_date

__all__ = [
    "Data",
    "HeldOut",
    "Layout",
    "Say",
    "agree_on_all_ranks",
    "agree_on_layout",
    "build_best_tracker",
    "build_eval_sets",
    "build_evaluator",
    "build_meters",
    "build_model",
    "build_objective",
    "choose_layout",
    "compute_other_reference",
    "device_name",
    "export",
    "fetch_model",
    "find_row_start",
    "freeze",
    "hash_inputs",
    "largest_micro_batch",
    "load_data",
    "load_held_out",
    "load_row_renderer",
    "manifest",
    "memory_advice",
    "num_steps",
    "open_checkpoints",
    "open_engine",
    "open_step_source",
    "open_teacher",
    "plan_of_run",
    "refuse_other_policy",
    "run_facts",
    "saved_shapes",
    "set_up_engine",
    "update_rule",
    "with_date",
    "with_start_of",
]
