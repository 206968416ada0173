"""fp8, w8a8, gptq and awq: rounded by llm-compressor, run by transformers, garbage seen. Needs the extra `quantize`."""

import json
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.core.errors import NumericError
from distft.core.optional import why_not
from distft.export_formats import EXPORT_FORMATS, llm_compressor
from distft.export_formats.command import main

FORMATS = ("fp8", "w8a8", "gptq", "awq")
needs_library = pytest.mark.skipif(bool(why_not("llmcompressor")), reason=why_not("llmcompressor"))
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "scale": 0.4}


def rows(folder: Path) -> str:
    file = folder / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in kit.SENTENCES * 4))
    return str(file)


def words(name: str, folder: Path) -> tuple[str, ...]:
    calibrated = ("--calibration", rows(folder), "--num-calibration", "16") if name != "fp8" else ()
    return ("--as", name, "--num-rows", "4", *calibrated)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_rounded_folder_is_loaded_and_compared(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = kit.save_model(tmp_path / "model", **WIDE)
    out = tmp_path / "out"
    made = kit.export(model, out, *words(name, tmp_path), "--levels", "all")
    levels = EXPORT_FORMATS[name].levels
    assert [level["level"] for level in made["levels"]] == list(levels)
    for number, level in enumerate(levels):
        found = kit.checks(made, number)
        assert all(check["ok"] for check in found.values()), found
        assert found["rounded matrices"]["count"] == 14, "seven of each layer"
        assert (made["levels"][number]["calibrated_on"] == {}) == (name == "fp8")
        lm: Any = AutoModelForCausalLM.from_pretrained(out / level, dtype=torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = torch.tensor([[1, 280, 300, 310, 275, 290, 333, 301]])
        with torch.no_grad():
            want, have = (torch.log_softmax(each(input_ids=ids).logits[0].double(), -1) for each in (plain, lm))
        kl = float((want.exp() * (want - have)).sum(-1).mean())
        assert 1e-7 < kl < 1.0, "rounded, and still the same model"
        config = json.loads((out / level / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert config["quantization_config"]["ignore"] == ["lm_head"]
        assert made["levels"][number]["commands"] == [f"vllm serve PATH/{level}"]
    if name == "gptq":
        kls = [level["figures"]["kl_nats"] for level in made["levels"]]
        assert kls[0] < 0.1 * kls[1], "eight bits, four bits"


@needs_library
@pytest.mark.slow
def test_groups_with_a_zero_point(tmp_path: Path) -> None:
    """transformers loads them dequantised; the day it loads them as they are, this says so and the guide can."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = kit.save_model(tmp_path / "model", **WIDE)
    out = tmp_path / "out"
    made = kit.export(model, out, *words("awq", tmp_path), "--set", "symmetric=false")
    assert all(check["ok"] for check in kit.checks(made).values())
    stored = load_file(out / "W4A16/model.safetensors")
    points = {name: tensor for name, tensor in stored.items() if name.endswith("weight_zero_point")}
    assert len(points) == 14
    assert all(tensor.dtype == torch.int32 for tensor in points.values()), "eight to a number"
    assert "CompressedTensorsConfig as C" in made["levels"][0]["commands"][1]
    how = CompressedTensorsConfig(dequantize=True)
    lm: Any = AutoModelForCausalLM.from_pretrained(out / "W4A16", dtype=torch.float32, quantization_config=how)
    name = "model.layers.0.mlp.up_proj"  # by hand: (q - zero) * scale, the lowest four bits first
    q_OI, scale_OG = unpacked(stored[f"{name}.weight_packed"]), stored[f"{name}.weight_scale"]
    zero_OG = unpacked(points[f"{name}.weight_zero_point"].T.contiguous()).T
    spread = q_OI.shape[1] // scale_OG.shape[1]
    want = (q_OI - zero_OG.repeat_interleave(spread, 1)) * scale_OG.repeat_interleave(spread, 1)
    torch.testing.assert_close(lm.get_submodule(name).weight.detach(), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out / "W4A16", dtype=torch.float32)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the four-bit numbers of a row of int32, -8 to 7."""
    nibbles = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], -1)
    return nibbles.flatten(1).float() - 8


@needs_library
@pytest.mark.slow
def test_an_adapter_is_merged_and_then_rounded(tmp_path: Path) -> None:
    base = kit.save_model(tmp_path / "base", **WIDE)
    adapter = kit.save_adapter(tmp_path / "adapter", base, use_rslora=True)
    made = kit.export(adapter, tmp_path / "out", *words("gptq", tmp_path), "--level", "W8A16")
    assert made["source"]["adapter"]
    assert kit.checks(made)["distributions"]["value"] < 0.05


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scales of other rows", "nothing rounded"])
def test_garbage_that_is_saved_without_an_error_is_seen(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What AutoAWQ writes here: a folder that loads and talks nonsense."""
    model = kit.save_model(tmp_path / "model", **WIDE)
    rounded = llm_compressor.round_model

    def broken(source: Path, out: Path, *given: Any) -> None:
        rounded(source, out, *given)
        file = out / "model.safetensors"
        tensors = load_file(file)
        if fault == "scales of other rows":
            tensors |= {name: value.flip(0) for name, value in tensors.items() if name.endswith("weight_scale")}
        else:
            tensors, config = load_file(source / "model.safetensors"), json.loads((out / "config.json").read_text())
            del config["quantization_config"]
            (out / "config.json").write_text(json.dumps(config))
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(llm_compressor, "round_model", broken)
    out = tmp_path / "exports" / "out"
    with pytest.raises(NumericError) as caught:
        kit.export(model, out, *words("gptq", tmp_path))
    assert ("W4A16: distributions: " in str(caught.value)) == (fault == "scales of other rows")
    assert ("W4A16: rounded matrices: 14 of 14" in str(caught.value)) == (fault == "nothing rounded")
    assert list(out.parent.iterdir()) == []


MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "no rows to calibrate on": (
        ("--as", "gptq", "--set", "group_size=32"),
        ("gptq fits its rounding to rows", "belongs to no run", "--calibration FILE"), 2,
    ),
    "narrow rows": (
        ("--as", "awq"), ("rows of 64 numbers are no multiple of groups of 128", "--set group_size=64"), 3
    ),
    "rows for a format that takes none": (
        ("--as", "fp8", "--calibration", "x.jsonl"), ("--calibration: fp8 fits its rounding to no rows",), 2
    ),
    "a level of another format": (("--as", "awq", "--level", "W8A8"), ("--level W8A8  is none of awq",), 2),
    "a group that is too small": (("--as", "gptq", "--set", "group_size=4"), ("--set group_size", "greater than"), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, said, code = MISTAKES[name]
    model = kit.save_model(tmp_path / "model", intermediate_size=128)
    assert main([str(model), "--out", str(tmp_path / "out"), "--num-rows", "2", *given]) == code
    message = capsys.readouterr().err
    for part in said:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_reward_models_and_rounded_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = kit.save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for change, said in (
        ({"architectures": ["LlamaForSequenceClassification"]}, "a reward model gives a number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised already"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        for name in FORMATS:
            assert main([str(model), "--out", str(tmp_path / "out"), "--as", name]) == 2
            assert said in capsys.readouterr().err


def test_without_the_library_the_line_that_brings_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.save_model(tmp_path / "model")
    monkeypatch.setattr(llm_compressor, "why_not", lambda package: f"{package} is not installed")
    assert main([str(model), "--out", str(tmp_path / "out"), "--as", "fp8", "--num-rows", "2"]) == 9
    message = capsys.readouterr().err
    assert "llmcompressor is not installed  pip install 'distft[quantize]' in an environment of its own" in message
    assert "pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.20.1 loguru" in message
    words = [str(model), "--out", str(tmp_path / "out"), "--as", "fp8", "--num-rows", "2", "--levels", "all"]
    assert main(words) == 2, "a certificate of nothing would say that all of it holds"
    assert "--levels all: no level of fp8 can be written here (FP8: llmcompressor is not installed" in (
        capsys.readouterr().err
    )
