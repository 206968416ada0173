"""Tiny bases of several architectures, adapters that PEFT wrote for them, and what merging must give, dense in fp64.

The oracle reads PEFT's files by itself and shares nothing with the code under test."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

VOCABULARY = 64
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(**_SIZES | more),
    "qwen": lambda **more: Qwen2Config(**_SIZES | more),
    "gemma": lambda **more: GemmaConfig(**_SIZES | {"head_dim": 8} | more),
    "gemma3": lambda **more: Gemma3TextConfig(**_SIZES | {"head_dim": 8} | more),
    "moe": lambda **more: Qwen3MoeConfig(
        **_SIZES | dict(moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=8) | more
    ),
    "gpt2": lambda **more: GPT2Config(
        **dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2) | more
    ),
}
_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}
              | {f"w{n}": n for n in range(3, VOCABULARY)}, "unk_token": "<unk>"},
}  # fmt: skip


def make_base(folder: Path, kind: str = "llama", *, tokenizer: bool = True, seed: int = 0, **more: Any) -> Path:
    """Save a random model; the folder also has a tokenizer of words, `w3 w4 ...`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_CONFIGS[kind](**more))
    for param in model.parameters():
        if param.ndim == 1:
            param.data += 0.1 * torch.randn_like(param)  # biases begin as zero, norms as one
    model.save_pretrained(folder)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, base: Path, config: Any, *, seed: int = 0, size: float = 0.3) -> Path:
    """Save an adapter that PEFT made for the base, all of its parameters moved at random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(size * torch.randn_like(param))  # in place: tied parameters stay tied
        model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a folder by the names of its files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rows(count: int = 4, length: int = 16, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for _ in range(count)]


def scale_of(config: dict[str, Any], module: str) -> float:
    def found(patterns: dict[str, Any], default: float) -> float:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank = found(config.get("rank_pattern") or {}, config["r"])
    alpha = found(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def dense_deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the change of each adapted weight [outputs, inputs] in fp64: scale * B A, of linear layers."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    held = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in held.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = held[key.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = scale_of(config, module) * (b.double() @ a.double())
    return found


def oracle(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return all weights of the merged model in fp64, for linear layers, magnitudes, biases and whole tensors."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    held = load_file(adapter / "adapter_model.safetensors")
    merged = {name: tensor.double() for name, tensor in tensors(base).items()}
    for key, tensor in held.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" not in key:
            merged[name] = tensor.double()
    for name, delta in dense_deltas(adapter).items():
        module, transposed = name.removesuffix(".weight"), bool(config["fan_in_fan_out"])
        moved = merged[name] + (delta.T if transposed else delta)
        magnitude = held.get(f"base_model.model.{module}.lora_magnitude_vector")
        if magnitude is not None:
            inputs = 0 if transposed else 1
            moved = moved / moved.norm(dim=inputs, keepdim=True) * magnitude.double().unsqueeze(inputs)
        merged[name] = moved
        shift = held.get(f"base_model.model.{module}.lora_B.bias")
        if shift is not None:
            merged[f"{module}.bias"] = merged[f"{module}.bias"] + scale_of(config, module) * shift.double()
    return merged
