"""An adapter that training goes on from (`[method] start`): filled from its folder, or refused with what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, build, documents

from distft.core.errors import DistftError
from distft.core.virtual_tokens import virtual_ids
from distft.model.adapters import METHODS

EXAMPLE = batch([[*virtual_ids(3), *text] for text in documents([30, 12])], trained_from=4)
PLAIN = batch(documents([30, 12]))
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "modules_to_save": ["norm"]},
    "qlora": {"r": 4},
    "ia3": {},
    "vera": {"r": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "bottleneck": {"size": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build(tiny_config).module.transformer.save_pretrained(folder)
    return folder


def losses(model: Any, method: str) -> torch.Tensor:
    example = EXAMPLE if METHODS[method].virtual_tokens(METHODS[method].params()) else PLAIN
    with torch.no_grad():
        return model.module.eval()(**example.inputs())


def saved(base: Path, method: str, folder: Path) -> torch.Tensor:
    model = build(base, method, init="pretrained", params=ADAPTERS[method])
    torch.manual_seed(0)
    own = {name: param for name, param in model.module.lm.named_parameters() if param.requires_grad}
    for param in own.values():
        param.data.add_(0.05 * torch.randn_like(param))
    METHODS[method].save_adapter(model.module.lm, folder, {name: param.detach() for name, param in own.items()})
    return losses(model, method)


@pytest.mark.parametrize("method", ADAPTERS)
def test_it_begins_as_what_was_saved(base: Path, tmp_path: Path, method: str) -> None:
    """Given the folder, or a run that has it as its final/."""
    (tmp_path / "final").mkdir()
    trained = saved(base, method, tmp_path / "final")
    for start in (tmp_path, tmp_path / "final"):
        model = build(base, method, init="pretrained", params={**ADAPTERS[method], "start": str(start)})
        assert torch.allclose(losses(model, method), trained, atol=1e-6)
    anew = build(base, method, init="pretrained", params=ADAPTERS[method])
    assert not torch.allclose(losses(anew, method), trained, atol=1e-3)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 8}, "r: 4 there, 8 here"),
    ("lora", {"r": 4, "alpha": 1.0, "modules_to_save": ["norm"]}, "lora_alpha: 32.0 there, 1.0 here"),
    ("lora", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "target_modules: .* there"),
    ("lora", {"r": 4, "rslora": True, "modules_to_save": ["norm"]}, "use_rslora: false there, true here"),
    ("ia3", {}, 'peft_type: "LORA" there, "IA3" here'),
    ("prompt_tuning", {"num_virtual_tokens": 3}, "the file lacks it"),
    ("bottleneck", {"size": 4}, 'peft_type: "LORA" there, "DISTFT_BOTTLENECK" here'),
]


@pytest.mark.parametrize(("method", "params", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_another_adapter_is_refused(
    base: Path, tmp_path: Path, method: str, params: dict[str, Any], message: str
) -> None:
    saved(base, "lora", tmp_path)
    with pytest.raises(DistftError, match=message):
        build(base, method, init="pretrained", params={**params, "start": str(tmp_path)})


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    saved(base, "lora", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/some/other"}))
    with pytest.raises(DistftError, match=r"it was trained on /some/other, and \[model\] path is"):
        build(base, "lora", init="pretrained", params={**ADAPTERS["lora"], "start": str(tmp_path)})


def test_a_folder_without_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DistftError, match=r"holds no adapter_config.json, nor does a final/ in it"):
        build(base, "lora", init="pretrained", params={"start": str(tmp_path)})


def test_sizes_of_a_prefix_are_compared(base: Path, tmp_path: Path) -> None:
    saved(base, "prefix_tuning", tmp_path)
    with pytest.raises(DistftError, match=r"the file has it as \(3, \d+\) instead of \(5, \d+\)"):
        build(base, "prefix_tuning", init="pretrained", params={"num_virtual_tokens": 5, "start": str(tmp_path)})
