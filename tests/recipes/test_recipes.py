"""Every shipped recipe loads, prints, and is what an editor's schema allows; without weights, data or network."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from distft.catalog import REGISTRIES
from distft.core.errors import RecipeError
from distft.recipe import load_recipe, parse_recipe, schema_text
from distft.recipe.schema import chosen_tables

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
EXPECTED = {
    "tiny-full": ("full", "zero3"),
    "tiny-lora": ("lora", "auto"),
    "tiny-qlora": ("qlora", "auto"),
    "llama8b-full": ("full", "zero3"),
    "llama8b-lora": ("lora", "auto"),
    "llama8b-qlora": ("qlora", "auto"),
    "llama70b-full": ("full", "zero3"),
    "llama70b-qlora": ("qlora", "auto"),
    "qwen0.5b-lora": ("lora", "auto"),
    "qwen7b-qlora": ("qlora", "auto"),
}


def test_the_recipes_that_the_guide_promises_are_there() -> None:
    assert set(EXPECTED) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEachRecipe:
    def test_resolves_and_prints_an_equal_recipe(self, path: Path) -> None:
        recipe = load_recipe(path, registries=REGISTRIES)
        assert recipe.name == path.stem
        assert EXPECTED.get(path.stem, (recipe.method.name, recipe.engine.name)) == (
            recipe.method.name,
            recipe.engine.name,
        )
        assert parse_recipe(recipe.to_toml(), source="printed", registries=REGISTRIES) == recipe

    def test_names_the_schema_for_editors(self, path: Path) -> None:
        assert path.read_text(encoding="utf-8").splitlines()[0] == "#:schema ./schema.json"

    def test_is_valid_for_editors(self, path: Path) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), json.loads(schema_text(REGISTRIES)))


def test_the_schema_is_current() -> None:
    """Renew it with `Path("recipes/schema.json").write_text(schema_text(REGISTRIES), encoding="utf-8")`."""
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == schema_text(REGISTRIES)


OLD = Path(__file__).parents[1] / "fixtures/recipes-8a04090"
"""The recipes of commit 8a04090, and in resolved.json what it read in them, defaults filled in."""
NEW_DEFAULTS = {"train.compile"}
"""Keys that mean something else today where a recipe does not say them (CHANGELOG.md)."""


@pytest.mark.parametrize("path", sorted(OLD.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_of_an_older_version_means_what_it_meant(path: Path) -> None:
    then = json.loads((OLD / "resolved.json").read_text(encoding="utf-8"))[path.name]
    now = flat(load_recipe(path, registries=REGISTRIES).resolved())
    assert {key: now.get(key) for key in flat(then)} == flat(then) | {
        key: now[key] for key in NEW_DEFAULTS & flat(then).keys()
    }


def test_ten_of_them_are_kept() -> None:
    assert {path.stem for path in OLD.glob("*.toml")} == set(EXPECTED)


def flat(value: object, key: str = "") -> dict[str, object]:
    """Key with dots -> value that is no table."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}".strip(".")).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for index, inner in enumerate(value) for k, v in flat(inner, f"{key}.{index}").items()}
    return {key: value}


ROLLOUTS = ["data.packing=false", 'rollout.rewards=[{name="exact_match"}]']
NEEDS = {
    "peft": ['method.type="HRA"'],
    "freeze": ["method.last_blocks=1"],
    **dict.fromkeys(("grpo", "rloo", "reinforce", "ppo"), ROLLOUTS),
    "distill": [*ROLLOUTS, 'objective.teacher="other"'],
}
"""What parts have no default of."""
LEAST = 'name = "run"\n[model]\npath = "base"\n[[data.train]]\npath = "train.jsonl"\n'
PARTS = [(table, name) for table in chosen_tables() for name in REGISTRIES.part(table)]
ODD = [
    "-1",
    "0",
    "0.5",
    "1e300",
    "true",
    '"odd"',
    '""',
    "[]",
    "[1]",
    '["a", 1]',
    "[[]]",
    "{}",
    "{ odd = 1 }",
    "[{}]",
    "nan",
]


"""Parts that do nothing without a key: the least of their keys."""


@pytest.mark.parametrize(("table", "name"), PARTS)
class TestEachPart:
    """What any room registers must be printable, and must turn every odd value into a message."""

    def test_its_defaults_print_an_equal_recipe(self, table: str, name: str) -> None:
        overrides = [f"{table}.name={name}", *NEEDS.get(name, [])]
        recipe = parse_recipe(LEAST, source="least", registries=REGISTRIES, overrides=overrides)
        assert parse_recipe(recipe.to_toml(), source="printed", registries=REGISTRIES) == recipe

    def test_odd_values_are_refused_in_words(self, table: str, name: str) -> None:
        for key in REGISTRIES.part(table)[name].params.model_fields:
            for odd in ODD:
                overrides = [f"{table}.name={name}", f"{table}.{key}={odd}"]
                try:
                    parse_recipe(LEAST, source="odd", registries=REGISTRIES, overrides=overrides)
                except RecipeError as error:
                    said = str(error)
                else:
                    said = ""
                assert "Input should" not in said
