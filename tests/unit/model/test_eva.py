"""EVA: what PEFT finds in the same rows, in packed ones; the ranks that it moves; and what is kept of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import batch, build, documents
from transformers import AutoModelForCausalLM

from distft.core.errors import DistftError
from distft.model.adapters import METHODS, eva
from distft.model.adapters.lora import base_name

BATCHES = [documents([30, 21, 17], seed=seed) for seed in range(2)]
TAU = 0.9
"""Nearer to 1 takes longer."""
FROM = 9
"""First trained token of each document."""


def ours(base: Path, params: dict[str, Any], *, trained_from: int = FROM) -> tuple[Any, dict[str, torch.Tensor]]:
    chosen = METHODS["lora"].params.model_validate_json(json.dumps(params | {"init": "eva"}))
    model = build(base, "lora", init="pretrained", params=params | {"init": "default", "eva": None})
    packed = [batch(texts, trained_from=trained_from) for texts in BATCHES]
    layers = eva.layers_of(model.module.lm, chosen)

    def forward(index: int) -> None:
        with torch.no_grad():
            model.module.eval()(**packed[index].inputs())

    return chosen, eva.found(model.module, layers, "lm.", chosen, packed, forward)


def theirs(base: Path, config: LoraConfig, *, trained_from: int) -> Any:
    """PEFT's own call on rows of their own, filled up to one length, with labels that are not shifted."""
    loader = []
    for texts in BATCHES:
        longest = max(map(len, texts))
        filled = [text + [0] * (longest - len(text)) for text in texts]
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        labels = [[-100] * trained_from + text[trained_from:] + [-100] * (longest - len(text)) for text in texts]
        given = {"input_ids": filled, "attention_mask": mask, "labels": labels}
        loader.append({name: torch.tensor(value) for name, value in given.items()})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model


@pytest.mark.parametrize(
    ("rho", "tokens"),
    [(2.0, "trained"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1.0, "trained"), (2.0, "all")))],
)
def test_directions_ranks_and_scales_are_pefts(base: Path, tmp_path: Path, rho: float, tokens: str) -> None:
    first = FROM if tokens == "trained" else 1
    pattern = {"v_proj": 2} if rho > 1 else {}
    params = {"r": 4, "alpha": 6.0, "rank_pattern": pattern, "alpha_pattern": {"up_proj": 3.0},
              "eva": {"rho": rho, "tokens": tokens, "tau": TAU}}  # fmt: skip
    chosen, found = ours(base, params, trained_from=first)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern=dict(pattern), init_lora_weights="eva",
        alpha_pattern={"up_proj": 3}, eva_config=EvaConfig(rho=rho, tau=TAU, use_label_mask=tokens == "trained"),
    )  # fmt: skip
    reference = theirs(base, config, trained_from=first)
    layers = {base_name(name): part for name, part in reference.named_modules() if isinstance(part, LoraLayer)}
    assert len(layers) > 10
    assert {name for name, rows in found.items() if len(rows)} == set(layers)
    for name, layer in layers.items():
        weight = layer.lora_A["default"].weight
        assert found[name].shape == weight.shape, name
        assert torch.allclose(found[name], weight, atol=1e-4), name
    moved = {name for name, rows in found.items() if len(rows) != (2 if pattern and "v_proj" in name else 4)}
    assert bool(moved) == (rho > 1), "ranks move where they may"

    file = tmp_path / "start.safetensors"
    save_file(found, file)
    started = eva.started(METHODS["lora"], chosen, file)
    model = _built(base, started, chosen)
    for name, part in model.module.lm.named_modules():
        if isinstance(part, LoraLayer):
            theirs_there = layers.pop(base_name(name))
            assert torch.equal(part.lora_A["default"].weight, load_file(file)[base_name(name)])
            assert not part.lora_B["default"].weight.any(), "the model starts as its base"
            assert part.scaling["default"] == pytest.approx(theirs_there.scaling["default"])
    assert not layers, "every layer that PEFT adapts has its adapter"
    saved = model.module.lm.peft_config["default"].to_dict()
    again = METHODS["lora"].settled(chosen, saved)
    assert again.rank_pattern == (saved["rank_pattern"] if rho > 1 else {})
    assert again.init == "default"


def _built(base: Path, method: Any, params: Any) -> Any:
    from distft.model import load
    from distft.recipe import ModelTable

    table = ModelTable(path=str(base), dtype="float32")
    cpu = torch.device("cpu")
    model = load.build(table, load.find_folder(table), method, params, seed=1, device=cpu)
    model.fill(model.module, cpu)
    return model


QUICK = {"r": 2, "eva": {"tau": 0.5}}


def test_it_is_the_same_twice_and_another_for_other_rows(base: Path) -> None:
    _, once = ours(base, QUICK)
    _, twice = ours(base, QUICK)
    _, other = ours(base, QUICK, trained_from=15)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not any(torch.allclose(once[name], other[name], atol=1e-3) for name in once)
    shared = [name for name in once if "layers.0.self_attn" in name and not name.endswith("o_proj")]
    assert len(shared) == 3
    assert all(torch.equal(once[name], once[shared[0]]) for name in shared), "layers with equal inputs"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"r": 64}, "r x rho = 64 takes twice as many  r x rho of 32 or less"),
        ({"r": 4, "eva": {"rho": 100.0}}, "r x rho = 400"),
        ({"r": 4, "target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is no linear layer"),
        ({"r": 4, "target_modules": ["lm_head"]}, "the head does not see every token"),
    ],
)
def test_layers_that_cannot_be_looked_at_are_refused(base: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(DistftError, match=message):
        ours(base, params)


def test_directions_that_never_stay_end_in_a_message(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "MOST_BATCHES", 2)
    with pytest.raises(DistftError, match=r"directions still turn after 2 batches: set \[method\] eva.tau lower"):
        ours(base, {"r": 4, "eva": {"tau": 0.999999}})


def test_nobody_looks_at_rows_where_a_model_is_built_without(base: Path) -> None:
    with pytest.raises(DistftError, match="starts from rows that nobody has looked at"):
        build(base, "lora", init="pretrained", params={"r": 4, "init": "eva"})
