"""The JSON Schema says what the loader does."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from distft.recipe import Registries, json_schema, parse_recipe, schema_text
from distft.recipe.schema import all_tables


@pytest.fixture
def schema(registries: Registries) -> dict[str, Any]:
    return json_schema(registries)


def test_it_is_closed_and_has_every_table(schema: dict[str, Any]) -> None:
    assert schema["required"] == ["name", "model", "data"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"name", "seed", "output_dir", *all_tables()}


def test_every_reference_leads_somewhere_and_nothing_is_left_over(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    for name in schema["$defs"]:
        assert f'"#/$defs/{name}"' in text
    assert text.count('"$ref"') == sum(text.count(f'"#/$defs/{name}"') for name in schema["$defs"])


def test_toml_has_no_null(registries: Registries) -> None:
    assert "null" not in schema_text(registries)


def test_a_chosen_table_is_one_closed_branch_per_part(schema: dict[str, Any]) -> None:
    full, lora, qlora = schema["properties"]["method"]["oneOf"]
    assert full["properties"] == {"name": {"const": "full", "default": "full"}}
    assert "required" not in full  # the default part's name may be left out
    assert lora["required"] == ["name"]
    assert lora["properties"]["r"] == {"default": 16, "description": "Rank.", "minimum": 1, "type": "integer"}
    assert set(qlora["properties"]) == {*lora["properties"], "quant"}
    assert all(branch["additionalProperties"] is False for branch in (full, lora, qlora))


def test_registered_words_are_listed(schema: dict[str, Any]) -> None:
    formats = schema["$defs"]["TrainSourceTable"]["properties"]["format"]["enum"]
    assert formats == ["auto", "messages", "prompt_completion", "text"]
    templates = schema["$defs"]["DataTable"]["properties"]["chat_template"]["anyOf"]
    assert templates[0]["enum"] == ["auto", "chatml", "llama3", "plain"]


def test_every_key_of_a_fixed_table_is_described(schema: dict[str, Any]) -> None:
    for name in ("ModelTable", "DataTable", "TrainTable", "EvalTable", "LogTable", "TrainSourceTable", "SourceTable"):
        for key, node in schema["$defs"][name]["properties"].items():
            assert node.get("description"), f"{name}.{key}"


def test_it_accepts_recipes_and_refuses_mistakes(registries: Registries, schema: dict[str, Any], minimal: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    recipe = parse_recipe(minimal, source="r.toml", registries=registries)
    validator.validate(tomllib.loads(minimal))
    validator.validate(tomllib.loads(recipe.to_toml()))
    for wrong in ("[method]\nr = 3\n", '[optim]\nname = "sgd"\n', "[train]\nepoch = 1\n", "[model.x]\n", "[x]\n"):
        assert not validator.is_valid(tomllib.loads(minimal + wrong)), wrong
