"""What LoRA starts from: the model as it was, PEFT's own matrices, and a saved adapter that fits the files' base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from tiny import batch, build, documents
from transformers import AutoModelForCausalLM

from distft.core.errors import DistftError
from distft.model.adapters import METHODS

INITS = ["gaussian", "orthogonal", "pissa", "olora"]
TEXTS = documents([30, 12])
EXAMPLE = batch(TEXTS)


def losses(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(**EXAMPLE.inputs())


def moved(model: Any) -> Any:
    torch.manual_seed(0)
    for param in model.module.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn_like(param))
    return model


def of_peft(base: Path, folder: Path) -> torch.Tensor:
    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    found = []
    for text in TEXTS:
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        found.append(-logits[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0])
    return torch.cat(found)


def saved(model: Any, folder: Path, method: str = "lora") -> Path:
    folder.mkdir()
    own = {name: param.detach() for name, param in model.module.lm.named_parameters() if param.requires_grad}
    METHODS[method].save_adapter(model.module.lm, folder, own)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_starts_as_the_base_and_is_saved_for_the_base_of_the_files(
    base: Path, tmp_path: Path, init: str, rslora: bool
) -> None:
    params = {"r": 4, "alpha": 6.0, "init": init, "rslora": rslora, "rank_pattern": {"down_proj": 2},
              "alpha_pattern": {"q_proj": 3.0}}  # fmt: skip
    model = build(base, "lora", init="pretrained", params=params)
    plain = losses(build(base, init="pretrained"))
    assert torch.allclose(losses(model), plain, atol=2e-5)
    trained = losses(moved(model))
    assert (trained - plain).abs().max() > 1e-2
    folder = saved(model, tmp_path / "adapter")
    assert torch.allclose(of_peft(base, folder), trained, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == (8 if init in ("pissa", "olora") else 4)
    assert config["init_lora_weights"] is True, "what reads the folder must change no base"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_matrices_are_pefts(base: Path, init: str) -> None:
    """Up to the sign of a direction, so products are compared; and the base beside them."""
    ours = build(base, "lora", init="pretrained", params={"r": 4, "init": init}).module.lm
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=init)
    theirs = dict(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).named_parameters())
    compared = 0
    for name, param in ours.named_parameters():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            product = dict(ours.named_parameters())[other] @ param
            assert torch.allclose(product, theirs[other] @ theirs[name], atol=1e-5), name
            compared += 1
        elif ".lora_B." not in name:
            assert torch.allclose(param, theirs[name], atol=1e-5), name
    assert compared == 14


def test_what_4_bits_lose_is_what_loftq_starts_from(base: Path, tmp_path: Path) -> None:
    exact = losses(build(base, init="pretrained"))
    gaps = {}
    for init in ("default", "loftq"):
        model = build(base, "qlora", init="pretrained", params={"r": 16, "init": init})
        gaps[init] = (losses(model) - exact).abs().mean().item()
    assert gaps["loftq"] < 0.8 * gaps["default"], gaps
    full = build(base, "qlora", init="pretrained", params={"r": 32, "init": "loftq", "target_modules": ["k_proj"]})
    only = build(base, "qlora", init="pretrained", params={"r": 32, "target_modules": ["k_proj"]})
    assert not torch.allclose(losses(full), losses(only), atol=1e-5)
    layer = full.module.transformer.model.layers[0].self_attn.k_proj
    from peft.utils.integrations import dequantize_module_weight

    weight = (
        dequantize_module_weight(layer.base_layer)
        + 1.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    stored = AutoModelForCausalLM.from_pretrained(base).model.layers[0].self_attn.k_proj.weight
    assert torch.allclose(weight, stored, atol=1e-5), "of full rank nothing is lost"


def test_blocks_and_patterns_say_which_layers_get_what(base: Path) -> None:
    params = {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1],
              "rank_pattern": {"down_proj": 2}}  # fmt: skip
    model = build(base, "lora", init="pretrained", params=params)
    ranks = {name: len(param) for name, param in model.module.named_parameters() if ".lora_A." in name}
    assert len(ranks) == 2
    assert all(".layers.1." in name and rank == (2 if "down_proj" in name else 4) for name, rank in ranks.items())
    for targets, count in (("all-linear", 7), (".*(q|k)_proj", 2)):
        model = build(base, "lora", params={"r": 4, "target_modules": targets, "layers_to_transform": [0]})
        names = [name for name, _ in model.module.named_parameters() if ".lora_A." in name]
        assert len(names) == count
        assert all(".layers.0." in name for name in names)


REFUSED = [
    ("lora", {"init": "loftq"}, "starts from what 4 bits lose"),
    ("qlora", {"init": "pissa"}, "changes the base, and 4 bits round it anew"),
    ("lora", {"init": "pissa", "dora": True}, "leave dora and modules_to_save out"),
    ("lora", {"init": "orthogonal", "r": 3}, "takes even ranks"),
    ("lora", {"init": "evr"}, "Input should be 'default'"),
    ("lora", {"init": "eva", "start": "runs/a"}, "start goes on from an adapter"),
    ("lora", {"rank_pattern": {"down_proj": 0}}, "is no rank"),
    ("lora", {"rank_pattern": {"dwn_proj": 4}}, 'rank_pattern: "dwn_proj" fits no layer.*they are q_proj'),
    ("lora", {"init": "pissa", "r": 128}, r"has a rank of \d+  set r = \d+ or less"),
    ("lora", {"init": "olora", "target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is no linear layer"),
    ("lora", {"layers_to_transform": [7]}, "7 is no block of the model  it has blocks 0 to 1"),
    ("lora", {"layers_to_transform": [0], "target_modules": ["lm_head"]}, "none of target_modules is in these blocks"),
]


@pytest.mark.parametrize(("method", "params", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_said(base: Path, method: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises((DistftError, ValidationError), match=message):
        build(base, method, init="pretrained", params=params)


def test_dora_beside_4_bits_is_dora_beside_what_they_dequantise_to(base: Path, tmp_path: Path) -> None:
    from peft_page import rounded_base

    rounded = rounded_base(base, tmp_path / "rounded")
    packed = build(base, "qlora", init="pretrained", params={"r": 4, "dora": True})
    whole = build(rounded, "lora", init="pretrained", params={"r": 4, "dora": True})
    plain = losses(build(base, "qlora", init="pretrained", params={"r": 4}))
    assert torch.allclose(losses(packed), plain, atol=1e-5), "magnitudes start as the norms"
    for model in (packed, whole):
        moved(model)
    assert torch.allclose(losses(packed), losses(whole), atol=1e-5)
    assert not torch.allclose(losses(packed), plain, atol=1e-2)
