"""Small models of any architecture that transformers has, as folders with weights and a tokenizer, and their losses by
plain transformers: what tests of arithmetic share."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distft.model import attention, proof
from distft.model.blocks import blocks_of
from distft.model.load import untrained
from distft.model.proof_verdict import ProofVerdict
from distft.model.reference import drawn_weights
from distft.model.shrink import distinct_depth, small_copies

_LETTERS = " .,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
TEXTS = [
    "A girl found a needle.",
    "Once there was a car. It was red.",
    "No.",
    "Rain fell.",
    "They had tea with a bear.",
    "The end.",
]
_GEMMA4_ASSISTANT = {
    "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 4, "num_kv_shared_layers": 4,
}  # fmt: skip
_QWEN4 = {
    "num_experts": 4, "num_experts_per_tok": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256,
    "indexer_budget": 32, "indexer_compress_ratio": 4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": [2] * 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_layer": 2},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "expand": 2},
    "zamba2": {"hidden_size": 64, "num_mem_blocks": 1},
    "gemma4_assistant": {"text_config": _GEMMA4_ASSISTANT},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
"""What a config of each kind must say where its defaults make no valid model."""


def small_config(kind: str, *, max_length: int = 256, **settings: Any) -> Any:
    """Return the config of a small model of this kind that transformers can run."""
    config = CONFIG_MAPPING[kind](**{**SETTINGS.get(kind, {}), **settings})
    text = config.get_text_config(decoder=True)
    for name, value in list(vars(text).items()):
        if isinstance(value, float) and ("drop" in name):  # drawn anew in every forward: nothing to compare with
            setattr(text, name, 0.0)
    with torch.device("meta"):
        depth = distinct_depth(blocks_of(untrained(copy.deepcopy(config), "eager")))
    for small in small_copies(config, depth=depth, max_length=max_length):
        try:
            with torch.device("meta"):
                lm = untrained(copy.deepcopy(small), "eager")
        except Exception:
            continue
        if sum(param.numel() for param in lm.parameters()) < 20_000_000:
            return small
    raise AssertionError(f"{kind}: no small model")


def model_folder(kind: str, folder: Path, *, max_length: int = 256, **settings: Any) -> Path:
    """Write a model of this kind with wide random weights and a tokenizer of letters."""
    config = small_config(kind, max_length=max_length, **settings)
    text = config.get_text_config(decoder=True)
    if isinstance(getattr(text, "max_position_embeddings", None), int):
        text.max_position_embeddings = max(max_length, text.max_position_embeddings)
    torch.manual_seed(0)
    lm = untrained(config, "eager").float()
    with torch.no_grad():
        for name, value in drawn_weights(lm):
            lm.get_parameter(name).copy_(value)
    lm.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *_LETTERS])}, "<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def documents(folder: Path) -> list[Tensor]:
    """Return TEXTS as a run trains on them: tokens and the end of the sequence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, 2]) for text in TEXTS]


def proven(kind: str, *, max_length: int = 512) -> ProofVerdict:
    """Return the verdict on the default config of a kind, on this machine's CPU in fp32."""
    attention.register()
    cpu = torch.device("cpu")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
        config.architectures = [name]
    except Exception as error:
        reason = f"its default config is not valid: {str(error).strip().splitlines()[0]}"
        return ProofVerdict(architecture=name, path=None, attempts=(), reason=reason)
    names = proof.attentions("auto", cpu, torch.float32)
    return proof.prove(config, untrained, attentions=names, device=cpu, dtype=torch.float32, max_length=max_length)


def page() -> str:
    """Return docs/architectures.md for the installed transformers."""
    groups: dict[str, list[tuple[str, str, str]]] = {"as it is": [], "by a fall-back": [], "refused": []}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdict = proven(kind)
        if verdict.path is None:
            groups["refused"].append((verdict.architecture, kind, verdict.reason.replace("|", "/")))
        else:
            rest = verdict.path.describe()
            groups["by a fall-back" if rest else "as it is"].append((verdict.architecture, kind, rest))
    lines = [
        "# Architectures",
        "",
        f"Every causal language model of transformers {version('transformers')}, by its default config, as proven on a "
        f"CPU in fp32 with torch {version('torch')} (`make architectures`; see "
        "[decision 50](decisions/0050-models-are-proven.md)). A run proves its own config, on its own device: this "
        "page says what to expect.",
        "",
        "- **right as it is**: packed, through this project's losses and attention;",
        "- **right by a fall-back**: the same numbers, by the slower way that is named. Models whose state flows along "
        "the row (Mamba, linear attention, convolutions) train on one document per forward here; with the kernels of "
        "their own packages on a GPU some are proven packed;",
        "- **refused**: the run ends with code 2 and what differs. Encoders and decoders of encoder-decoder models are "
        "here because transformers lists them.",
        "",
    ]
    for group, rows in groups.items():
        lines += [f"## {'Refused' if group == 'refused' else 'Right ' + group} ({len(rows)})", ""]
        lines += ["| class | model_type | how |" if rows and rows[0][2] else "| class | model_type |"]
        lines += ["|---|---|---|" if rows and rows[0][2] else "|---|---|"]
        lines += [f"| {name} | {kind} |{f' {rest} |' if rest else ''}" for name, kind, rest in rows]
        lines += [""]
    return "\n".join(lines)


def loss_of(lm: Any, rows: list[Tensor]) -> float:
    """Return transformers' own loss, each document alone, mean over all predicted tokens."""
    total = count = 0.0
    lm.eval()
    for ids in rows:
        with torch.no_grad():
            loss = lm(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        total += loss.double().item() * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
