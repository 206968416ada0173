"""K levels: llama.cpp's own rounding through xllamacpp, on rows that are wide enough, with and without importance."""

import ctypes
import json
from pathlib import Path
from typing import Any

import export_kit as kit
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from distft.core.errors import NumericError
from distft.export_formats import gguf_writer, importance, llama_cpp_quantizer
from distft.export_formats.gguf_levels import LEVELS, ModelShape, tensor_type

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64, "scale": 0.4}
K_LEVELS = [level.name for level in LEVELS.values() if level.is_mixed]


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def rows(folder: Path) -> Path:
    file = folder / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in kit.SENTENCES * 4))
    return file


def test_a_k_level_is_written_run_and_compared(tmp_path: Path) -> None:
    model = kit.save_model(tmp_path / "model", **WIDE)
    out = tmp_path / "out"
    words = ("--as", "gguf", "--level", "Q4_K_M", "--num-rows", "2", "--calibration", str(rows(tmp_path)))
    made = kit.export(model, out, *words, "--num-calibration", "32")
    assert all(check["ok"] for check in kit.checks(made).values())
    assert made["levels"][0]["calibrated_on"]["rows"] == 32
    # llama.cpp's mixture at four layers: more bits for the last eighth and every third.
    found = types(out / "model-Q4_K_M.gguf")
    assert [layer for layer in range(4) if found[f"blk.{layer}.attn_v.weight"] == "Q6_K"] == [2, 3]
    assert found["token_embd.weight"] == "Q6_K", "tied: it is the head"
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.slow
def test_every_level_of_wide_rows(tmp_path: Path) -> None:
    model = kit.save_model(tmp_path / "model", **WIDE)
    made = kit.export(model, tmp_path / "out", "--as", "gguf", "--levels", "all", "--num-rows", "2")
    by_level = {level["level"]: level for level in made["levels"]}
    assert list(by_level) == list(LEVELS)
    assert "left_out" not in made
    assert all(check["ok"] for level in made["levels"] for check in level["checks"])
    size = {name: by_level[name]["bytes"] for name in by_level}
    assert size["Q8_0"] > size["Q6_K"] > size["Q5_K_M"] > size["Q4_K_M"] > size["Q3_K_M"] > size["Q2_K"]
    kls = [by_level[name]["figures"]["kl_nats"] for name in ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")]
    assert kls == sorted(kls)


def test_importance_is_what_goes_into_each_matrix_and_makes_it_rounder_elsewhere(tmp_path: Path) -> None:
    """Columns that nothing goes into may be rounded as they like; the others come out better."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(kit.save_model(tmp_path / "model"), dtype=torch.float32)
    ids = [[1, 280, 300, 310], [275, 290, 333]]
    made = importance.importance_matrix(model, ids)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0][0])
    )
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    want = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(made["model.layers.1.mlp.down_proj.weight"], want)
    torch.testing.assert_close(made["model.embed_tokens.weight"], made["lm_head.weight"])
    assert set(made) - {"lm_head.weight"} == {name for name, param in model.named_parameters() if param.dim() == 2}
    values = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    weights = np.full(512, 1e-4, dtype=np.float32)
    weights[::8] = 1.0
    import gguf

    def error(given: np.ndarray | None) -> float:
        raw = llama_cpp_quantizer.quantize_rows(values, "Q4_K", given)
        back = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)
        return float(((back - values)[:, ::8] ** 2).mean())

    assert error(weights) < 0.6 * error(None)


def test_a_wrong_type_of_a_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows rounded as another type than the file says: what a mix of two libraries would write."""
    model = kit.save_model(tmp_path / "model", **WIDE)
    rounded = llama_cpp_quantizer.quantize_rows

    def shifted(values: Any, quant: str, weights: Any) -> Any:
        return (
            np.roll(rounded(values, quant, weights), 1, axis=1) if quant == "Q6_K" else rounded(values, quant, weights)
        )

    monkeypatch.setattr(llama_cpp_quantizer, "quantize_rows", shifted)
    with pytest.raises(NumericError, match="distributions"):
        kit.export(model, tmp_path / "out", "--as", "gguf", "--level", "Q6_K", "--num-rows", "2")


def test_a_matrix_without_importance_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.core.errors import DataError

    model = kit.save_model(tmp_path / "model", **WIDE)
    measured = importance.importance_matrix
    without = "model.layers.0.self_attn.o_proj.weight"
    monkeypatch.setattr(
        importance,
        "importance_matrix",
        lambda *given: {name: value for name, value in measured(*given).items() if name != without},
    )
    words = ("--as", "gguf", "--level", "Q4_K_M", "--num-rows", "2", "--calibration", str(rows(tmp_path)))
    with pytest.raises(DataError, match=r"o_proj\.weight: calibration measured no input of it"):
        kit.export(model, tmp_path / "out", *words)


@pytest.mark.slow
@pytest.mark.parametrize("level", K_LEVELS)
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_s_own_tool_writes_the_same_bytes(level: str, tied: bool, tmp_path: Path) -> None:
    """The reference is llama.cpp's whole quantiser, which llama-cpp-python compiles (20 minutes): optional."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which compiles llama.cpp")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = kit.save_model(tmp_path / "model", tie_word_embeddings=tied, **WIDE | {"num_hidden_layers": 17})
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    about: dict[str, Any] = {"name": "model", "tokenizer": tokenizer, "stop_ids": (2, 4)}
    gguf_writer.write_gguf(model, tmp_path / "F32.gguf", LEVELS["F32"], **about)
    for weights in (None, importance.importance_matrix(lm, [[1, 280, 300, 310, 275, 290, 333]])):
        ours, theirs = tmp_path / f"ours-{weights is None}.gguf", tmp_path / f"theirs-{weights is None}.gguf"
        gguf_writer.write_gguf(model, ours, LEVELS[level], importance=weights, **about)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{level}")
        kept = _their_importance(llama_cpp, weights, ours) if weights is not None else None
        if kept is not None:
            params.imatrix = kept[0]
        done = llama_cpp.llama_model_quantize(
            str(tmp_path / "F32.gguf").encode(), str(theirs).encode(), ctypes.byref(params)
        )
        assert done == 0
        assert types(ours) == types(theirs)
        want = {tensor.name: tensor.data for tensor in GGUFReader(theirs).tensors}
        for tensor in GGUFReader(ours).tensors:
            assert np.array_equal(tensor.data, want[tensor.name]), tensor.name


def _their_importance(llama_cpp: Any, weights: dict[str, torch.Tensor], file: Path) -> Any:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 17)
    arrays = {}
    for name, value in weights.items():
        arrays[names.get_name(name, try_suffixes=(".weight",))] = value.numpy().astype(np.float32)
    arrays = {name: array for name, array in arrays.items() if name in types(file)}
    made = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, array) in zip(made, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = array.size
    return made, arrays


def test_the_choice_of_types_at_the_sizes_that_it_depends_on() -> None:
    """From llama-quant.cpp, read by hand: grouped queries, two layers of values, 70B."""
    small = ModelShape(arch="llama", num_layers=32, queries_per_key=1, tied=False)
    grouped = ModelShape(arch="qwen2", num_layers=80, queries_per_key=8, tied=False)

    def of(level: str, name: str, shape: ModelShape = small) -> str:
        return tensor_type(LEVELS[level], name, 2, shape)

    assert of("Q2_K", "blk.5.attn_v.weight") == "Q3_K"
    assert of("Q2_K", "blk.5.attn_v.weight", grouped) == "Q5_K", "Q4_K for grouped queries, more for 70B"
    assert of("Q3_K_M", "blk.1.attn_v.weight") == "Q5_K"
    assert of("Q3_K_M", "blk.2.attn_v.weight") == "Q4_K"
    assert [layer for layer in range(32) if of("Q4_K_M", f"blk.{layer}.ffn_down.weight") == "Q6_K"] == [
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31,
    ]  # fmt: skip
    assert of("Q4_K_M", "output.weight") == "Q6_K"
    assert of("Q4_K_M", "token_embd.weight") == "Q4_K"
    assert of("Q3_K_M", "blk.1.ffn_down.weight") == "Q5_K"
    assert of("Q3_K_M", "blk.2.ffn_down.weight") == "Q4_K"
