"""The tables of keys: that they agree with the recipe, with each other, and with the page that shows them."""

import re
from pathlib import Path

import pytest
from importing_page import page

from distft.catalog import REGISTRIES
from distft.importers import IMPORTERS
from distft.recipe.other_words import OTHER_WORDS
from distft.recipe.schema import RunKeys, chosen_tables, fixed_tables

ROOT = Path(__file__).resolve().parents[3]
EVERY = [(spec, section, table) for spec in IMPORTERS.values() for section, table in spec.keys.items()]


def test_the_page_is_current() -> None:
    """Renew it with `make importing`."""
    assert (ROOT / "docs" / "importing.md").read_text(encoding="utf-8") == page()


def known_keys(table: str) -> set[str]:
    if table in fixed_tables():
        return set(fixed_tables()[table].model_fields)
    specs = REGISTRIES.part(table).values()
    return {"name"}.union(*(spec.params.model_fields for spec in specs))


@pytest.mark.parametrize(("spec", "section", "table"), EVERY, ids=[f"{one.name}-{part}" for one, part, _ in EVERY])
def test_every_home_is_a_key_of_the_recipe(spec: object, section: str, table: dict) -> None:
    for name, key in table.items():
        if key.fate in ("left", "refused"):
            assert key.text, name
            assert not key.home, name
            continue
        found = re.match(r"\[?\[([a-z_.]+)\]\]?(?: (\w+))?", key.home)
        if found is None:
            assert key.home.split("/")[0] in RunKeys.model_fields or "messages'" in key.home, (name, key.home)
            continue
        whole, word = found[1], found[2]
        if whole in ("data.train", "data.eval"):
            source = fixed_tables()["data"].model_fields[whole.split(".")[1]]
            assert word is None or word in str(source.annotation) or word in _source_keys(), (name, key.home)
        else:
            assert whole in {*fixed_tables(), *chosen_tables()}, (name, key.home)
            assert word is None or word in known_keys(whole), (name, key.home)


def _source_keys() -> set[str]:
    from distft.recipe.schema import TrainSourceTable

    return set(TrainSourceTable.model_fields)


def test_hints_of_the_recipe_and_importers_share_one_table() -> None:
    carried = {
        name: key.home
        for spec in IMPORTERS.values()
        for name, key in spec.keys[""].items()
        if key.fate in ("carried", "changed")
    }
    nested = {name for spec in IMPORTERS.values() for table in spec.keys.values() for name in table}
    elsewhere = {"train_batch_size", "gradient_clipping"}  # DeepSpeed's
    assert set(OTHER_WORDS) - nested == elsewhere
    shared = {"torch_dtype", "optimizer", "lr_scheduler", "batch_size", "datasets"}
    for name, home in OTHER_WORDS.items():
        if name in carried and name not in shared:
            assert home.split()[0] in carried[name], (name, home, carried[name])


def test_every_key_that_is_carried_is_read_by_code() -> None:
    """The tables say what happens; that it does is in the modules beside them."""
    sources = [path for path in (ROOT / "distft" / "importers").glob("*.py") if not path.stem.endswith("_keys")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    silent = {
        name
        for _, _, table in EVERY
        for name, key in table.items()
        if key.fate in ("carried", "changed") and f'"{name}"' not in code
    }
    assert silent == set()
