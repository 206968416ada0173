"""Looking at adapters, and giving them another form: figures against dense ones, forms against what they compute."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merging_kit import dense_deltas, make_adapter, make_base, oracle, rows, tensors
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distft.merging.base_model import BaseModel
from distft.merging.delta_sources import AdapterDeltas, FileDeltas
from distft.merging.looking import diff, inspect
from distft.merging.merging import MergeSource, merge
from distft.merging.reshaping import convert, extract, resize

TARGETS = ["q_proj", "down_proj"]
PLAIN = LoraConfig(r=4, target_modules=TARGETS, lora_alpha=6)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", "llama", attention_bias=True)


def test_inspect(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", base, replace(PLAIN, use_rslora=True))
    wanted = dense_deltas(folder)
    by_file, on_base = (
        inspect(FileDeltas(folder), None),
        inspect(AdapterDeltas(folder, BaseModel(base)), BaseModel(base)),
    )
    for looks in (by_file, on_base):
        assert [look.name for look in looks.tensors] == sorted(wanted)
        for look in looks.tensors:
            values = torch.linalg.svdvals(wanted[look.name])
            assert look.norm == pytest.approx(float(wanted[look.name].norm()), rel=1e-5)
            assert look.spectral_norm == pytest.approx(float(values[0]), rel=1e-5)
            assert look.rank == 4
            shares = values.square().cumsum(0) / values.square().sum()
            assert look.ranks_for_most == next(n + 1 for n, share in enumerate(shares) if share >= 0.9)
    assert by_file.norm == pytest.approx(
        math.sqrt(sum(float(delta.norm()) ** 2 for delta in wanted.values())), rel=1e-5
    )
    relative = {look.name: look.relative_norm for look in on_base.tensors}
    assert relative[Q] == pytest.approx(float(wanted[Q].norm() / tensors(base)[Q].norm()), rel=1e-5)
    assert by_file.tensors[0].relative_norm is None


def test_diff(base: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", base, PLAIN, seed=1)
    two = make_adapter(tmp_path / "two", base, replace(PLAIN, target_modules=["q_proj", "o_proj"]), seed=2)
    found = diff(FileDeltas(one), FileDeltas(two))
    first, second = dense_deltas(one), dense_deltas(two)
    assert [entry.name for entry in found.tensors] == [Q.replace("1", "0"), Q]
    for entry in found.tensors:
        a, b = first[entry.name], second[entry.name]
        assert entry.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
        assert entry.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        spaces = [torch.linalg.svd(delta)[0][:, :4] for delta in (a, b)]
        assert entry.overlap_outputs == pytest.approx(float((spaces[0].T @ spaces[1]).square().sum()) / 4, abs=1e-6)
        spaces = [torch.linalg.svd(delta)[2][:4] for delta in (a, b)]
        assert entry.overlap_inputs == pytest.approx(float((spaces[0] @ spaces[1].T).square().sum()) / 4, abs=1e-6)
        assert entry.sign_conflicts == pytest.approx(float((a.sign() != b.sign()).double().mean()))
    assert [names[0].split(".")[-2] for names in found.only_in] == ["down_proj", "o_proj"]
    dot = sum(float((first[name] * second[name]).sum()) for name in first.keys() & second.keys())
    norms = [math.sqrt(sum(float(delta.norm()) ** 2 for delta in deltas.values())) for deltas in (first, second)]
    assert found.cosine == pytest.approx(dot / norms[0] / norms[1], abs=1e-6)
    same = diff(FileDeltas(one), FileDeltas(one))
    assert (same.cosine, same.sign_conflicts) == (pytest.approx(1.0), 0.0)
    assert all(entry.overlap_outputs == pytest.approx(1.0) for entry in same.tensors)


def test_what_needs_its_base_is_looked_at_on_it(base: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", base, replace(PLAIN, use_dora=True, modules_to_save=["lm_head"]))
    changed = oracle(base, dora)
    looks = {look.name: look for look in inspect(AdapterDeltas(dora, BaseModel(base)), None).tensors}
    for name in (Q, "lm_head.weight"):
        assert looks[name].norm == pytest.approx(float((changed[name] - tensors(base)[name]).norm()), rel=1e-5)
        assert looks[name].rank is None


@pytest.mark.parametrize("tied", [False, True])
def test_extract(tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "down_proj" not in name:  # what has not changed gets no adapter
                param += 0.1 * torch.randn_like(param)
    model.save_pretrained(tmp_path / "full")
    found = extract(tmp_path / "full", base, tmp_path / "adapter", rank=8)
    end, start, products = tensors(tmp_path / "full"), tensors(base), dense_deltas(tmp_path / "adapter")
    assert products.keys() == {name for name in end if name.endswith("_proj.weight") and "down_proj" not in name}
    for entry in found:
        change = end[entry.name if entry.name in end else "model.embed_tokens.weight"].double()
        change = change - start[entry.name if entry.name in start else "model.embed_tokens.weight"].double()
        assert entry.norm == pytest.approx(float(change.norm()), rel=1e-4)
        if entry.rank:
            values = torch.linalg.svdvals(change)
            assert entry.lost == pytest.approx(float(values[8:].norm()), rel=1e-3, abs=1e-5)
            assert float((products[entry.name] - change).norm()) == pytest.approx(entry.lost, rel=1e-3, abs=1e-5)
    assert json.loads((tmp_path / "adapter/extract.json").read_text())["rank"] == 8
    # Merged again: whole tensors are the model's own, and a head that was tied stays tied.
    report = merge(
        MergeSource(adapter=tmp_path / "adapter", base=base), tmp_path / "again", rows=rows(), dtype=torch.float32
    )
    assert report.untied is False
    merged = tensors(tmp_path / "again")
    assert merged.keys() == end.keys()
    for name in end.keys() - products.keys():
        torch.testing.assert_close(merged[name], end[name], atol=1e-6, rtol=0)


def test_extract_at_full_rank_is_the_model(tmp_path: Path) -> None:
    more = {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = make_base(tmp_path / "base", "llama", **more)
    full = make_base(tmp_path / "full", "llama", seed=9, **more)
    extract(full, base, tmp_path / "adapter", rank=16)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    ids = torch.tensor(rows(2))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(full)(input_ids=ids).logits
        torch.testing.assert_close(peft(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stable", [False, True])
def test_resize(stable: bool, base: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, use_rslora=stable, rank_pattern={"down_proj": 3}, modules_to_save=["lm_head"])
    folder = make_adapter(tmp_path / "a", base, config)
    found = resize(folder, tmp_path / "small", rank=2)
    before, after = dense_deltas(folder), dense_deltas(tmp_path / "small")
    assert before.keys() == after.keys()
    for entry in found:
        change = before[f"{entry.name}.weight"]
        lost = float(torch.linalg.svdvals(change)[2:].norm())
        assert float((after[f"{entry.name}.weight"] - change).norm()) == pytest.approx(lost, rel=1e-4)
        assert entry.relative_error == pytest.approx(lost / float(change.norm()), rel=1e-4)
    key = "base_model.model.lm_head.weight"
    files = [load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "small")]
    assert torch.equal(files[0][key], files[1][key])
    saved = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"], saved["rank_pattern"]) == (2, 2, False, {})


def test_resize_of_an_embedding(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", base, replace(PLAIN, target_modules=["embed_tokens"]))
    resize(folder, tmp_path / "small", rank=3)
    for place in (folder, tmp_path / "small"):
        merge(
            MergeSource(adapter=place, base=base), tmp_path / f"{place.name}-merged", rows=rows(), dtype=torch.float32
        )
    places = (base, tmp_path / "a-merged", tmp_path / "small-merged")
    start, whole, cut = (tensors(place)["model.embed_tokens.weight"].double() for place in places)
    values = torch.linalg.svdvals(whole - start)
    assert float((cut - whole).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-3)


@pytest.mark.parametrize("stable", [False, True])
def test_convert(stable: bool, base: Path, tmp_path: Path) -> None:
    config = replace(
        PLAIN, use_rslora=stable, rank_pattern={"down_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 5}
    )
    folder = make_adapter(tmp_path / "a", base, config)
    others = convert(folder, tmp_path / "b", scale="plain" if stable else "rslora")
    saved = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert saved["use_rslora"] is not stable
    assert saved["lora_alpha"] == pytest.approx(6 * 2 if stable else 6 / 2)
    assert others.keys() == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", Q.removesuffix(".weight")}
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (folder, tmp_path / "b")]
    assert weights[0] == weights[1], "tensors are copied byte by byte"
    before, after = dense_deltas(folder), dense_deltas(tmp_path / "b")
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, atol=1e-12, rtol=1e-12)
    convert(tmp_path / "b", tmp_path / "back", scale="rslora" if stable else "plain")
    back = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert back["lora_alpha"] == 6
    # PEFT reads the same scales.
    models = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(place)) for place in (folder, tmp_path / "b")]  # fmt: skip  # noqa: E501
    ids = torch.tensor(rows(1))
    with torch.no_grad():
        torch.testing.assert_close(
            models[0](input_ids=ids).logits, models[1](input_ids=ids).logits, atol=1e-6, rtol=1e-5
        )


def test_convert_keeps_what_is_beside(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", base, replace(PLAIN, use_dora=True))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "combine.json").write_text("{}")
    convert(folder, tmp_path / "b", scale="rslora")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    held = load_file(tmp_path / "b/adapter_model.safetensors")
    assert any("magnitude" in key for key in held)
