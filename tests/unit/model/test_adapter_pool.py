"""Many adapters beside one base: each computes as it does alone, rows of one batch under different ones, mixtures."""

import statistics
import time
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distft.core.errors import RecipeError
from distft.model.adapters.pool import FIRST, AdapterPool

IDS = torch.tensor([[1, 280, 300, 310], [1, 275, 290, 333], [1, 301, 302, 303], [1, 304, 305, 306]])
KINDS: dict[str, dict[str, Any]] = {
    "first": {"use_rslora": True},
    "second": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "third": {"use_dora": True, "target_modules": ["o_proj"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pool")
    base = kit.save_model(folder / "base")
    made = {name: kit.save_adapter(folder / name, base, seed=n, **kind) for n, (name, kind) in enumerate(KINDS.items())}
    return {"base": base} | made


@pytest.fixture
def pool(folders: dict[str, Path]) -> AdapterPool:
    made = AdapterPool(folders["first"], dtype=torch.float32)
    for name in ("second", "third"):
        made.add(name, folders[name])
    return made


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def alone(folders: dict[str, Path], name: str) -> Any:
    lm: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    return (lm if name == "base" else PeftModel.from_pretrained(lm, folders[name])).eval()


def test_each_computes_as_it_does_alone_and_each_row_with_its_own(folders: dict[str, Path], pool: AdapterPool) -> None:
    own: dict[str | None, str] = {FIRST: "first", "second": "second", "third": "third", None: "base"}
    want = {name: logits(alone(folders, folder)) for name, folder in own.items()}
    assert pool.names == (FIRST, "second", "third")
    for name in own:
        with pool.using(name) as model:
            torch.testing.assert_close(logits(model), want[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="adapter third: DoRA and other variants of LoRA cannot be chosen"):
        pool.rows_of([FIRST, "third"]).__enter__()
    rows: list[str | None] = ["second", None, FIRST, "second"]
    with pool.rows_of(rows) as model:
        mixed = logits(model)
        written = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], want[name][row], atol=1e-5, rtol=1e-5)
        assert row == 0 or (want[name][row] - want[rows[row - 1]][row]).abs().max() > 0.1, "they differ"
        lm = alone(folders, own[name])
        again = lm.generate(input_ids=IDS[row : row + 1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert written[row, : again.shape[1]].tolist() == again[0].tolist()
    torch.testing.assert_close(logits(pool.model), want[FIRST], atol=1e-5, rtol=1e-5)  # all is as it was


def test_a_mixture_is_the_sum_of_what_each_changes(folders: dict[str, Path]) -> None:
    pool = AdapterPool(folders["first"], dtype=torch.float32)
    pool.add("second", folders["second"])
    lm = alone(folders, "base")
    weights = {FIRST: 0.25, "second": 0.75}
    for name, folder in ((FIRST, "first"), ("second", "second")):
        beside = alone(folders, folder)
        for path, module in beside.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                with torch.no_grad():
                    lm.get_submodule(path).weight += weights[name] * module.get_delta_weight("default")
    with pool.mixing(weights) as model:
        torch.testing.assert_close(logits(model), logits(lm), atol=1e-4, rtol=1e-4)
    with pool.using(FIRST) as model:
        torch.testing.assert_close(logits(model), logits(alone(folders, "first")), atol=1e-5, rtol=1e-5)


def test_saved_modules_are_switched_and_not_mixed_by_row(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = kit.save_adapter(tmp_path / "saved", folders["base"], seed=7, modules_to_save=["norm"])
    pool = AdapterPool(folders["first"], dtype=torch.float32)
    pool.add("saved", saved)
    for name, place in (("saved", saved), (FIRST, folders["first"])):
        want = logits(alone(folders | {"it": place}, "it"))
        with pool.using(name) as model:
            torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    with pool.using(None) as model:
        torch.testing.assert_close(logits(model), logits(alone(folders, "base")), atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="cannot be chosen row by row"), pool.rows_of([FIRST] * 4):
        pass


def test_mistakes(folders: dict[str, Path], pool: AdapterPool, tmp_path: Path) -> None:
    with (
        pytest.raises(RecipeError, match=r"adapter second2: there is none  did you mean second\?"),
        pool.using("second2"),
    ):
        pass
    with pytest.raises(RecipeError, match="the name is taken"):
        pool.add("second", folders["second"])
    other = kit.save_adapter(tmp_path / "other", kit.save_model(tmp_path / "base2", num_hidden_layers=1))
    with pytest.raises(RecipeError, match="take adapters of one base"):
        pool.add("other", other)
    activated = kit.save_adapter(tmp_path / "activated", folders["base"], alora_invocation_tokens=[5, 6])
    with pytest.raises(RecipeError, match=r"an aLoRA, which acts behind the tokens \[5, 6\] alone"):
        pool.add("activated", activated)
    with pytest.raises(RecipeError, match="an aLoRA"):
        AdapterPool(activated, dtype=torch.float32)
    assert pool.names == (FIRST, "second", "third")


def test_fifty_adapters_take_their_own_memory_and_are_switched_at_once(folders: dict[str, Path]) -> None:
    pool = AdapterPool(folders["first"], dtype=torch.float32)
    base, first = pool.num_bytes(None), pool.num_bytes(FIRST)
    for number in range(49):
        pool.add(f"a{number}", folders["first"])
    held = sum(param.numel() * param.element_size() for param in pool.model.parameters())
    assert held == base + 50 * first, "the base is there once"
    times = []
    for number in range(49):
        began = time.perf_counter()
        with pool.using(f"a{number}"):
            times.append(time.perf_counter() - began)
    assert statistics.median(times) < 5e-3
    with pool.using("a48") as model:
        torch.testing.assert_close(logits(model), logits(alone(folders, "first")), atol=1e-5, rtol=1e-5)
    pool.remove("a48")
    assert sum(param.numel() * param.element_size() for param in pool.model.parameters()) == base + 49 * first
