"""GGUF files, loaded by llama.cpp itself: every family and tokenizer, levels, and planted faults that are seen."""

import json
import re
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from distft.core.errors import NumericError
from distft.export_formats import gguf_architecture, gguf_vocabulary, gguf_writer, table

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama, tied": ("llama", kit.byte_fallback, {}),
    "llama, untied, biases": ("llama", kit.byte_fallback, {"tie_word_embeddings": False, "attention_bias": True}),
    "llama 3: its rotation and pieces": (
        "llama",
        lambda: kit.byte_level(kit.LLAMA3_SPLIT, ignore_merges=True),
        {"rope_parameters": LLAMA3_ROPE},
    ),
    "llama, linear rotation, gpt-2's pieces": ("llama", lambda: kit.byte_level(None), {"rope_parameters": LINEAR_ROPE}),
    "llama, smollm's pieces": ("llama", lambda: kit.byte_level(None, digits=True), {}),
    "mistral": ("mistral", kit.byte_fallback, {"sliding_window": None}),
    "qwen2": ("qwen2", kit.byte_level, {"head_dim": 16}),
    "qwen3, untied": ("qwen3", kit.byte_level, {"tie_word_embeddings": False}),
    "gemma": ("gemma", kit.gemma_like, GEMMA | {"vocab_size": 480}),
    "gemma2": ("gemma2", lambda: kit.byte_fallback(prefix=False), {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        lambda: kit.byte_fallback(prefix=False),
        {"query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_does_what_transformers_does(name: str, tmp_path: Path) -> None:
    kind, tokenizer, config = FAMILIES[name]
    model = kit.save_model(tmp_path / "model", kind, tokenizer=tokenizer(), **config)
    made = kit.export(model, tmp_path / "out", "--as", "gguf", "--level", "F32", "--num-rows", "4")
    found = kit.checks(made)
    assert all(check["ok"] for check in found.values()), found
    assert found["tokenisation"]["count"] >= 400
    assert found["chat template"]["count"] >= 5
    assert found["stop tokens"]["count"] == (25 if name == "gemma" else 5), "added tokens"
    assert found["greedy tokens"]["compared"].startswith("256 tokens behind 4 prompts: 4 of 4 equal")
    assert found["distributions"]["value"] < 1e-8
    assert made["proven"]
    assert made["levels"][0]["runtime"].startswith("xllamacpp ")


def test_a_level_is_rounded_as_it_says_and_the_folder_is_whole(tmp_path: Path) -> None:
    model = kit.save_model(tmp_path / "model")
    out = tmp_path / "out"
    made = kit.export(model, out, "--as", "gguf", "--levels", "all", "--num-rows", "2")
    by_level = {level["level"]: level for level in made["levels"]}
    assert list(by_level) == ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"], "rows of 64 and 96"
    kls = [by_level[level]["figures"]["kl_nats"] for level in ("F32", "BF16", "Q8_0", "Q4_0")]
    assert kls == sorted(kls)
    assert by_level["F32"]["bytes"] > 1.6 * by_level["F16"]["bytes"] > 2.2 * by_level["Q8_0"]["bytes"]
    assert set(made["left_out"]) == {"Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"}
    assert all("no multiple of 256" in reason for reason in made["left_out"].values())
    exact = by_level["F32"]["figures"]["perplexity"]
    good = [entry for entry in made["levels"] if entry["figures"]["perplexity"] <= 1.02 * exact]
    assert made["take"] == min(good, key=lambda entry: entry["bytes"])["level"]
    types = {tensor.tensor_type.name for tensor in GGUFReader(out / "model-Q8_0.gguf").tensors}
    assert types == {"Q8_0", "F32"}
    written = json.loads((out / "certificate.json").read_text())
    assert written["files"].keys() == {path.name for path in out.iterdir()} - {"certificate.json"}
    card = (out / "README.md").read_text()
    assert "## How to run it" in card
    assert "llama-server -m PATH/model-Q4_0.gguf" in card


def test_the_smallest_level_that_keeps_the_gain_is_advised() -> None:
    def entry(level: str, size: int, perplexity: float, **lost: float) -> dict[str, Any]:
        task = [
            {"name": f"qa.{name}", "before": 0.0, "tuned": 0.9 if name == "right" else 0.1, "level": 0.0, "lost": value}
            for name, value in lost.items()
        ]
        return {"level": level, "bytes": size, "figures": {"perplexity": perplexity}, "task": task}

    levels = [entry("F32", 40, 10.0, right=0.0, rare=0.0), entry("Q8", 10, 10.1, right=0.04, rare=0.5),
              entry("Q5", 6, 10.1, right=0.06, rare=0.0), entry("Q4", 5, 10.3, right=0.0, rare=0.0)]  # fmt: skip
    assert table.advised(levels) == "Q8", "Q5 loses of the gain, Q4 of perplexity; the rare figure is not looked at"
    shown = list(table.lines({"levels": levels}))
    assert shown[1].split()[-1] == "0%"
    assert shown[-1].startswith("take Q8: the smallest that keeps 95% of the gain and perplexity within 2%")
    assert "rare" not in "".join(shown)
    assert table.advised(levels[:1]) is None
    assert table.advised([entry("Q4", 5, 10.0), {"level": "Q2", "bytes": 3, "figures": {}, "task": []}]) is None


def test_a_merged_adapter_is_compared_with_the_adapter_beside_its_base(tmp_path: Path) -> None:
    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base, use_rslora=True)
    made = kit.export(adapter, tmp_path / "out", "--as", "gguf", "--level", "F32", "--num-rows", "2")
    assert kit.checks(made)["distributions"]["value"] < 1e-8
    assert made["source"]["adapter"]


# -- planted faults ------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, source: Path, *words: str) -> str:
    """Return the message of an export that has to fail, with nothing left of it."""
    out = tmp_path / "exports" / "out"
    with pytest.raises(NumericError) as caught:
        kit.export(source, out, *words)
    assert list(out.parent.iterdir()) == []
    assert caught.value.exit_code == 5
    return str(caught.value)


GGUF = ("--as", "gguf", "--level", "F16", "--num-rows", "3")


def test_a_wrong_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.merging.adapter_config import AdapterConfig

    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base, use_rslora=True)

    def without_root(self: AdapterConfig, module: str) -> float:
        return self.alpha_of(module) / self.rank_of(module)  # instead of alpha / sqrt(r)

    monkeypatch.setattr(AdapterConfig, "scale_of", without_root)
    assert "distributions: " in refused(tmp_path, adapter, *GGUF)
    assert "logits: " in refused(tmp_path, adapter, "--as", "safetensors", "--num-rows", "3")


@pytest.mark.slow
def test_merges_that_llama_cpp_makes_and_the_tokenizer_does_not(tmp_path: Path) -> None:
    """llama.cpp joins any two tokens whose text is one; a tokenizer may lack that merge, and then cuts otherwise."""
    content = json.loads(kit.gemma_like().to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair for pair in merges if "▁▁" not in pair or pair[1] == "▁"]
    model = kit.save_model(tmp_path / "model", tokenizer=Tokenizer.from_str(json.dumps(content)), vocab_size=480)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "x  y   z     end"}))
    assert "tokenisation: " in refused(tmp_path, model, *GGUF, "--rows", str(rows))


def test_a_wrong_template_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.save_model(tmp_path / "model")
    written = gguf_writer.served_template
    monkeypatch.setattr(gguf_writer, "served_template", lambda text: written(text).replace("assistant\n", "assistant "))
    message = refused(tmp_path, model, *GGUF)
    assert "F16: chat template: 6 of 6, allowed 0 that differ" in message
    assert "distributions" not in message


@pytest.mark.slow
def test_a_missing_stop_token_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.save_model(tmp_path / "model")
    stops = {"eos_token_id": [2, 3, 4]}  # llama.cpp knows <|im_end|> (4) by its text, and not <|im_start|> (3)
    (model / "generation_config.json").write_text(json.dumps(stops))
    kit.export(model, tmp_path / "good", *GGUF)
    written = gguf_writer._add_vocabulary
    monkeypatch.setattr(
        gguf_writer, "_add_vocabulary", lambda writer, words, stop_ids: written(writer, words, stop_ids[:1])
    )
    assert "<|im_start|> (id 3) does not end an answer there" in refused(tmp_path, model, *GGUF)


@pytest.mark.slow
def test_tokens_that_llama_cpp_takes_for_ends_by_their_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    model = kit.save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"])
    tokenizer.save_pretrained(model)
    made = kit.export(model, tmp_path / "good", *GGUF)
    assert kit.checks(made)["stop tokens"]["count"] == 8
    monkeypatch.setattr(gguf_writer, "_ENDS_BY_TEXT", {})
    message = refused(tmp_path, model, *GGUF)
    for token in ("fim_pad", "repo_name", "file_sep"):
        assert re.search(rf"<\|{token}\|> \(id \d+\) ends an answer there, and not in the source", message)


@pytest.mark.parametrize("form", ["gguf", pytest.param("safetensors", marks=pytest.mark.slow)])
def test_a_source_that_never_stops_is_seen(form: str, tmp_path: Path) -> None:
    model = kit.save_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    message = refused(tmp_path, model, "--as", form, "--num-rows", "2")
    assert "the template ends answers with <|im_end|> (4), which is no stop token" in message


def test_rows_of_q_and_k_in_transformers_order_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.save_model(tmp_path / "model")
    monkeypatch.setattr(gguf_architecture, "permuted", lambda tensor, heads: tensor)
    message = refused(tmp_path, model, *GGUF)
    assert "greedy tokens: " in message
    assert "distributions: " in message


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (lambda tokens, ranks: tuple(float(ranks.get(token, 0)) for token in tokens), "tokenisation"),
        (lambda tokens, ranks: (0.0,) * len(tokens), "chat template"),
    ],
    ids=["the last merge first", "no order"],
)
def test_a_tokenizer_with_wrong_scores_is_seen_though_greedy_tokens_agree(
    fault: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.save_model(tmp_path / "model")
    monkeypatch.setattr(gguf_vocabulary, "_scores", fault)
    message = refused(tmp_path, model, *GGUF)
    assert f"F16: {check}: " in message
    assert "greedy tokens" not in message
    assert "distributions" not in message
