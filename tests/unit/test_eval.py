"""Which model `distft eval` means, and what it says when there is none."""

from __future__ import annotations

import json
from pathlib import Path

import export_kit
import pytest
import torch
from transformers import AutoModelForCausalLM

from distft import load_recipe
from distft.core.errors import RecipeError
from distft.eval.subject import Subject, choose, read
from distft.model.adapters import METHODS
from distft.model.adapters.trained import evaluated

RECIPE = """\
name = "run"
output_dir = "{folder}"
[model]
path = "demo:tiny-llama"
init = "random"
{method}
[[data.train]]
path = "demo:incidents/train"
[[data.eval]]
path = "demo:incidents/valid"
"""


def run(folder: Path, method: str = "") -> Path:
    """A run folder as training leaves it, without tensors."""
    own = folder / "run"
    (own / "checkpoints/step-00000040").mkdir(parents=True)
    (own / "checkpoints/step-00000020").mkdir()
    (own / "recipe.toml").write_text(RECIPE.format(folder=folder, method=method))
    (own / "checkpoints/best.json").write_text('{"step": 20, "eval_loss": 1.0}')
    (own / "exit.json").write_text(json.dumps({"code": 0, "state": {"step": 45}}))
    (own / "final").mkdir()
    (own / "final" / ("adapter_config.json" if method else "config.json")).write_text("{}")
    return own


def chosen(own: Path, model: str | None = None, label: str | None = None) -> Subject:
    recipe, folder = read(str(own), [], None)
    assert folder == own
    return choose(recipe, folder, model, label)


def test_what_the_words_mean(tmp_path: Path) -> None:
    own = run(tmp_path)
    seen = {model: chosen(own, model) for model in ("base", "final", "best", "40")}
    assert {model: (one.label, one.step) for model, one in seen.items()} == {
        "base": ("before", 0), "final": ("after", 45), "best": ("best", 20), "40": ("step-00000040", 40),
    }  # fmt: skip
    assert chosen(own).label == "after", "final where there is one"
    assert seen["final"].built.model.path == str(own / "final")
    assert seen["final"].built.model.init == "pretrained"
    assert seen["final"].built.model.tokenizer == seen["base"].built.model.path, "the same tokens are asked"
    assert seen["best"].checkpoint == own / "checkpoints/step-00000020"
    assert chosen(own, label="mine").label == "mine"


def test_final_is_the_best_state_where_the_run_went_back_to_it(tmp_path: Path) -> None:
    own = run(tmp_path)
    (own / "events.jsonl").write_text('{"event": "started", "step": 0}\n{"event": "load_best", "best": 20}\n')
    subject = chosen(own, "final")
    assert (subject.label, subject.step) == ("best", 20)


def test_an_adapter_is_put_on_the_recipes_base(tmp_path: Path) -> None:
    own = run(tmp_path, '[method]\nname = "lora"')
    subject = chosen(own)
    assert subject.adapter == own / "final"
    assert subject.built.method.name == "lora"
    recipe = load_recipe(own / "recipe.toml", overrides=['method={name="full"}'])
    with pytest.raises(RecipeError, match="holds an adapter, and the recipe's method has none"):
        choose(recipe, own, "final", None)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("30", "no such checkpoint  steps kept: 40, 20"),
        ("finish", "neither a model, an adapter nor a checkpoint"),
    ],
)
def test_there_is_no_such_model(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        chosen(run(tmp_path), model)


def test_no_best_and_no_label(tmp_path: Path) -> None:
    own = run(tmp_path)
    (own / "checkpoints/best.json").unlink()
    with pytest.raises(RecipeError, match=r"no best.json  train with \[checkpoint\] best = true"):
        chosen(own, "best")
    with pytest.raises(RecipeError, match="must be a plain folder name"):
        chosen(own, "base", "../x")


def test_a_recipe_stands_for_its_run_folder(tmp_path: Path) -> None:
    own = run(tmp_path)
    file = tmp_path / "r.toml"
    file.write_text((own / "recipe.toml").read_text())
    _, folder = read(str(file), [], None)
    assert folder == tmp_path / "run"
    _, folder = read(str(file), ['name="other"'], str(tmp_path / "runs"))
    assert folder == tmp_path / "runs/other"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ""),
        ({"lora_alpha": 16}, "lora_alpha: 16 there, 8.0 here"),
        ({"alora_invocation_tokens": [5]}, "alora"),
        ({"use_rslora": True}, "use_rslora: true there, false here"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: "),
        ({"r": 2, "lora_alpha": 4}, "r: 2 there, 4 here"),
    ],
)
def test_an_adapter_of_another_scale_is_not_computed_by_the_recipes(
    config: dict[str, object], said: str, tmp_path: Path
) -> None:
    """A combined adapter has scale 1 whatever the recipe says; with the recipe's it would be another adapter."""
    base = export_kit.save_model(tmp_path / "base")
    adapter = export_kit.save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"], **config)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    method = METHODS["lora"]
    params = method.params(r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    if "alora" in said:
        with pytest.raises(RecipeError, match="an aLoRA, which acts behind the tokens"):
            evaluated(method, adapter)
        return
    if not said:
        evaluated(method, adapter).attach(lm, params, torch.float32)
        return
    with pytest.raises(RecipeError, match=r"distft merge .* --out DIR") as caught:
        evaluated(method, adapter).attach(lm, params, torch.float32)
    assert said in str(caught.value)
