"""One TOML file in, one frozen and fully resolved `Recipe` out, or every mistake in it with its line."""

from distft.recipe.engine_rules import refuse_engine
from distft.recipe.eval_rules import listed_params
from distft.recipe.evaluation import AnswersTable, EvalTable
from distft.recipe.json_schema import json_schema, schema_text
from distft.recipe.load import load_recipe, parse_recipe
from distft.recipe.rules import check_steps, check_world
from distft.recipe.schema import (
    CheckpointTable,
    Choice,
    DataTable,
    LogTable,
    ModelTable,
    Recipe,
    Registries,
    SourceTable,
    TrainSourceTable,
    TrainTable,
)
from distft.recipe.update_rules import refuse_sums

__all__ = [
    "AnswersTable",
    "CheckpointTable",
    "Choice",
    "DataTable",
    "EvalTable",
    "LogTable",
    "ModelTable",
    "Recipe",
    "Registries",
    "SourceTable",
    "TrainSourceTable",
    "TrainTable",
    "check_steps",
    "check_world",
    "json_schema",
    "listed_params",
    "load_recipe",
    "parse_recipe",
    "refuse_engine",
    "refuse_sums",
    "schema_text",
]
