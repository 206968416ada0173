"""Tokenizers of real models on random ones, where the files are: texts, chats and ends as in transformers."""

import json
import os
import shutil
from pathlib import Path

import export_kit as kit
import pytest
from gguf import GGUFReader

from distft.core.errors import NumericError

TOKENIZERS = Path(os.environ.get("DISTFT_ASSETS", "/nowhere")) / "tokenizers"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="DISTFT_ASSETS names no folder with tokenizers"),
]
QWEN_ENDS = (151645, 151643)
"""<|im_end|> and <|endoftext|>, as Qwen2.5-Instruct's generation_config.json has them."""


def real(folder: Path, name: str, kind: str, ends: tuple[int, ...], rows: int) -> Path:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "scale": 0.4}
    model = kit.save_model(folder, kind, vocab_size=rows, **wide)
    for file in [*folder.glob("*token*"), folder / "chat_template.jinja"]:
        file.unlink(missing_ok=True)
    for file in (TOKENIZERS / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    return model


def test_qwen_s_tokenizer(tmp_path: Path) -> None:
    model = real(tmp_path / "model", "qwen2.5", "qwen2", QWEN_ENDS, 151936)
    for level in ("F32", "Q4_K_M"):
        out = tmp_path / level
        made = kit.export(model, out, "--as", "gguf", "--level", level, "--num-rows", "3")
        found = kit.checks(made)
        assert all(check["ok"] for check in found.values()), found
        assert found["tokenisation"]["count"] > 400
        assert found["chat template"]["count"] >= 5
        assert found["stop tokens"]["count"] > 20
        types = {tensor.tensor_type.name for tensor in GGUFReader(out / f"model-{level}.gguf").tensors}
        assert types == ({"F32"} if level == "F32" else {"F32", "Q4_K", "Q6_K"})


def test_an_end_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    """llama.cpp ends at the text <|endoftext|> whatever the file says."""
    model = real(tmp_path / "model", "qwen2.5", "qwen2", QWEN_ENDS[:1], 151936)
    with pytest.raises(NumericError, match=r"<\|endoftext\|> \(id 151643\) ends an answer there, and not in the"):
        kit.export(model, tmp_path / "out", "--as", "gguf", "--level", "F32", "--num-rows", "1")


def test_gpt2_s_tokenizer(tmp_path: Path) -> None:
    model = real(tmp_path / "model", "gpt2", "llama", (50256,), 50257)
    made = kit.export(model, tmp_path / "out", "--as", "gguf", "--level", "F32", "--num-rows", "3")
    assert all(check["ok"] for check in kit.checks(made).values()), kit.checks(made)
    assert kit.checks(made)["tokenisation"]["count"] > 400
