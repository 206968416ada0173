"""What an engine cannot train is refused when the recipe is read, or when `auto` has chosen it; plans say it too."""

from pathlib import Path

import pytest

from distft import load_recipe
from distft.core.errors import RecipeError
from distft.engine import ENGINES
from distft.recipe import refuse_engine

TEXT = """name = "x"
[model]
path = "demo:tiny-llama"
[method]
{method}
[engine]
name = "{engine}"
[[data.train]]
path = "demo:incidents/train"
format = "prompt_completion"
[train]
max_steps = 3
"""
CUT = {
    # method: (engine that cannot, why, engines that can)
    'name = "adalora"': ("fsdp2", "looks at whole tensors", "solo, ddp"),
    'name = "qlora"\ndora = true': ("zero3", "reads packed weights", "solo, ddp, zero1, zero2, fsdp2"),
    'name = "lora"\ndeploy = "q4_0"': ("zero3", "layers read each other's weights", "solo, ddp, zero1, zero2, fsdp2"),
    'name = "peft"\ntype = "BEFT"': ("fsdp2", "one row each", "solo, ddp, zero1, zero2, zero3"),
}


def written(folder: Path, method: str, engine: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(TEXT.format(method=method, engine=engine))
    return path


@pytest.mark.parametrize("method", CUT)
def test_a_named_engine_is_refused_where_it_is_named(tmp_path: Path, method: str) -> None:
    engine, why, able = CUT[method]
    with pytest.raises(RecipeError) as error:
        load_recipe(written(tmp_path, method, engine))
    line = 7 + method.count("\n")
    assert f"line {line} " in str(error.value)
    assert why in str(error.value)
    assert f"engines that can: {able}" in str(error.value)
    for other in able.split(", "):
        load_recipe(written(tmp_path, method, other))


def test_a_chosen_engine_is_refused_as_well(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, 'name = "lora"\ndeploy = "q4_0"', "auto"))
    refuse_engine(recipe, "ddp", ENGINES)
    with pytest.raises(RecipeError, match="layers read each other's weights"):
        refuse_engine(recipe, "zero3", ENGINES)
    text = (
        written(tmp_path, 'name = "full"', "auto")
        .read_text()
        .replace("[train]\n", "[train]\noptimizer_in_backward = true\nmax_grad_norm = 'off'\n")
    )
    (tmp_path / "recipe.toml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"line 12 .*in its own buffers  engines that can: solo, fsdp2"):
        refuse_engine(recipe, "zero3", ENGINES)
