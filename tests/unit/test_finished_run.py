"""A run that is complete: the same recipe is told so, whatever version wrote it; another one is refused."""

import json
from pathlib import Path

import pytest

from distft import load_recipe, train
from distft.core.errors import RecipeError

TEXT = 'name = "run"\n[model]\npath = "base"\n[[data.train]]\npath = "rows.jsonl"\n[method]\nname = "lora"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose run has ended well in `tmp_path`, as this version writes it."""
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    folder = tmp_path / "runs/run"
    (folder / "final").mkdir(parents=True)
    written = load_recipe(path, overrides=[f'output_dir="{tmp_path}/runs"']).to_toml()
    (folder / "recipe.toml").write_text(written)
    (folder / "exit.json").write_text(json.dumps({"code": 0, "state": {"step": 12, "samples": 96}}))
    return path


def start(path: Path, *overrides: str) -> int:
    return train(load_recipe(path, overrides=[f'output_dir="{path.parent}/runs"', *overrides])).state.step


def test_it_is_complete(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(recipe) == 12
    assert "already complete" in "".join(capsys.readouterr())


def test_so_is_one_of_an_earlier_version(recipe: Path) -> None:
    """It had a key that is gone, and not yet one that came later."""
    written = recipe.parent / "runs/run/recipe.toml"
    text = written.read_text()
    assert "rslora = false\n" in text
    text = text.replace("rslora = false\n", "").replace("[data]\n", "[data]\nprefix_sharing = false\n")
    written.write_text(text)
    assert start(recipe) == 12


def test_another_recipe_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="finished run of another recipe with this name  change name, or say"):
        start(recipe, "seed=7")
    (recipe.parent / "runs/run/recipe.toml").write_text("no recipe")
    with pytest.raises(RecipeError, match="another recipe"):
        start(recipe)


@pytest.mark.parametrize("gone", ["true", '"no"', "0"])
def test_a_removed_key_is_refused_with_another_value(recipe: Path, gone: str) -> None:
    recipe.write_text(TEXT.replace("[[data.train]]", f"[data]\nprefix_sharing = {gone}\n[[data.train]]"))
    with pytest.raises(RecipeError, match=r"line 5 .*is gone, and means false: .*remove it"):
        load_recipe(recipe)
    assert load_recipe(recipe, overrides=["data.prefix_sharing=false"]).data.packing


def test_what_is_written_without_rewards_is_part_of_the_recipe(tmp_path: Path) -> None:
    """Two runs that write otherwise are two runs."""
    path = tmp_path / "run.toml"
    text = TEXT.replace(
        '[method]\nname = "lora"', '[data]\npacking = false\n[objective]\nname = "distill"\nteacher = "big"'
    )
    path.write_text(text + "[rollout]\nmax_new_tokens = 7\n")
    recipe = load_recipe(path)
    assert recipe.resolved()["rollout"]["max_new_tokens"] == 7
    assert recipe.digest() != load_recipe(path, overrides=["rollout.max_new_tokens=8"]).digest()
