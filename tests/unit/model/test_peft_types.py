"""`name = "peft"`: types that PEFT has and such as others register with it, and what the page says of each."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scale_type
import torch
from harness import ROOT
from peft import PeftModel
from tiny import batch, build, documents
from transformers import AutoModelForCausalLM

from distft.catalog import REGISTRIES
from distft.core.errors import DistftError
from distft.model.adapters import METHODS, peft_types
from distft.recipe import parse_recipe

EXAMPLE = batch(documents([30, 12]))
RECIPE = """\
name = "r"
[model]
path = "base"
[[data.train]]
path = "train.jsonl"
[method]
name = "peft"
type = "SCALE"
"""


@pytest.fixture
def registered() -> Iterator[None]:
    scale_type.register()
    try:
        yield
    finally:
        scale_type.unregister()


def losses(model: Any) -> torch.Tensor:
    return model.module(**EXAMPLE.inputs())


@pytest.mark.usefixtures("registered")
def test_a_type_that_nobody_has_heard_of(base: Path, tmp_path: Path) -> None:
    """Its keys are read with their types, it trains, and PEFT reads what was saved."""
    read = parse_recipe(RECIPE + "start_at = 1.5\n", source="r.toml", registries=REGISTRIES).method.params
    assert read.fields_of_type() == {"start_at": 1.5}
    for wrong, message in (('start_at = "1"', "must be a number"), ("start_att = 1", 'did you mean "start_at"')):
        with pytest.raises(DistftError, match=message):
            parse_recipe(f"{RECIPE}{wrong}\n", source="r.toml", registries=REGISTRIES)
    with pytest.raises(DistftError, match="quant: SCALE has not been seen to train rightly beside 4 bits"):
        parse_recipe(f"{RECIPE}quant = {{}}\n", source="r.toml", registries=REGISTRIES)
    params = {"type": "SCALE", "target_modules": ["q_proj", "down_proj"]}
    model = build(base, "peft", init="pretrained", params=params)
    assert torch.equal(losses(model), losses(build(base, init="pretrained"))), "factors of one"
    losses(model).sum().backward()
    own = {name: param for name, param in model.module.lm.named_parameters() if param.requires_grad}
    assert len(own) == 4
    assert all(name.endswith("scale_factor.default") and param.grad is not None for name, param in own.items())
    with torch.no_grad():
        for param in own.values():
            param -= 0.1 * param.grad
    METHODS["peft"].save_adapter(model.module.lm, tmp_path, {name: param.detach() for name, param in own.items()})
    text = documents([20])[0]
    bounds = torch.tensor([0, 20], dtype=torch.int32)
    ids = torch.tensor([text])
    with torch.no_grad():
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path)).eval()
        ours = model.module.transformer(ids, use_cache=False, cu_seq_lens_q=bounds, max_length_q=20).logits
        assert torch.allclose(peft(ids).logits, ours, atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_what_follows_from_the_weights_is_drawn_beside_them(base: Path) -> None:
    """The base has no values while PEFT attaches: what it made of none is made again when the layer has been filled."""
    model = build(base, "peft", init="pretrained", params={"type": "SCALE", "from_weight": True})
    layers = {name: part for name, part in model.module.named_modules() if isinstance(part, scale_type.ScaleLayer)}
    assert len(layers) == 14
    for layer in layers.values():
        assert torch.allclose(layer.scale_factor["default"], layer.base_layer.weight.norm(dim=1))


@pytest.mark.parametrize("name", ["SUPERTUNING", "DELORA", "OSF", "TINYLORA"])
def test_types_that_start_from_values_lost_are_refused_by_looking(base: Path, name: str) -> None:
    """Not by their names alone: an index of the largest weights, a buffer, a decomposition."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from distft.model.adapters.peft_tuner import TunerParams, attach_tuner

    configs: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    lm = build(base, fill=False).module.transformer
    with pytest.raises(DistftError, match="follows from"):
        attach_tuner(
            lm, lambda: configs[name](task_type="CAUSAL_LM", target_modules=["q_proj"]), TunerParams(), torch.float32
        )


def test_the_page_has_every_type_once() -> None:
    """`make peft-types` writes it; a PEFT with other types needs another page."""
    text = (ROOT / "docs/peft-types.md").read_text(encoding="utf-8")
    table, _, rest = text.partition("## Types with a method of their own")
    own, _, refused = rest.partition("## Refused")
    tried = re.findall(r"^\| ([A-Z0-9_]+) \|", table, re.MULTILINE)
    listed = [re.findall(r"^- ([A-Z0-9_]+):", part, re.MULTILINE) for part in (own, refused)]
    assert listed == [list(peft_types.OWN_METHODS), sorted(peft_types.REFUSED)]
    assert sorted([*tried, *listed[0], *listed[1]]) == sorted(peft_types.registered_types())
    for row in table.splitlines():
        if row.startswith("| ") and row.split(" | ")[0][2:] in tried:
            name, solo, *_, four_bit, _, _ = [cell.strip(" |") for cell in row.split(" | ")]
            assert solo == "trains", name
            assert four_bit == ("equal" if name in peft_types.ON_4BIT else "refused"), name
