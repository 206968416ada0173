"""Names of modules in a recipe: each must match something that can be trained, else the nearest names are said."""

import json
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from distft.model import skeleton
from distft.model.adapters import targets
from distft.model.adapters.lora import LoraParams
from distft.model.adapters.qlora import QloraParams

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def said(config: Any, **settings: Any) -> list[tuple[Any, str, str]]:
    """(what follows `method` in the key, message, fix) of every fault."""
    found = targets.faults(targets.listing(skeleton.build(config)), LoraParams(**settings))
    return [(fault.key[1:], fault.message, fault.fix) for fault in found]


WRONG = {
    "one of two": (
        {"target_modules": ("q_proj", "v_prj")},
        ("target_modules", 1),
        '"v_prj" is no module of the model',
        'did you mean "v_proj"',
    ),
    "one of one": (
        {"target_modules": ("q_prj",)},
        ("target_modules", 0),
        '"q_prj" is no module of the model',
        'did you mean "q_proj"',
    ),
    "saved": (
        {"modules_to_save": ("lm_haed",)},
        ("modules_to_save", 0),
        '"lm_haed" is no module of the model',
        'did you mean "lm_head"?',
    ),
    "saved beside a right one": (
        {"modules_to_save": ("lm_head", "embed_token")},
        ("modules_to_save", 1),
        '"embed_token" is',
        'did you mean "embed_tokens"',
    ),
    "case": ({"target_modules": ("Q_Proj",)}, ("target_modules", 0), '"Q_Proj" is no module', 'did you mean "q_proj"'),
    "another architecture": (
        {"target_modules": ("c_attn",)},
        ("target_modules", 0),
        '"c_attn" is no module',
        "the model has embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
    ),
    "a block too many": (
        {"target_modules": ("layers.2.self_attn.q_proj",)},
        ("target_modules", 0),
        '"layers.2.self_attn.q_proj" is no module',
        'did you mean "self_attn.q_proj"',
    ),
    "part of a name": (
        {"modules_to_save": ("head",)},
        ("modules_to_save", 0),
        '"head" is no module',
        'did you mean "lm_head"?',
    ),
    "a module that holds others": (
        {"target_modules": ("self_attn",)},
        ("target_modules", 0),
        "means model.layers.0.self_attn, a LlamaAttention: only linear layers and embeddings take an adapter",
        "name the layers in it: q_proj, k_proj, v_proj, o_proj",
    ),
    "a norm": (
        {"target_modules": ("q_proj", "norm")},
        ("target_modules", 1),
        "means model.norm, a LlamaRMSNorm",
        "train it whole: modules_to_save",
    ),
    "nothing to train": (
        {"modules_to_save": ("act_fn",)},
        ("modules_to_save", 0),
        "which has nothing to train",
        "leave it out",
    ),
    "none": ({"target_modules": ()}, ("target_modules",), "names no module", '"all-linear"'),
    "a name as text": (
        {"target_modules": "q_proj"},
        ("target_modules",),
        "is one text, so a regular expression for whole names; it fits none",
        'write a list, ["q_proj"], or ".*q_proj"',
    ),
    "a pattern in a list": (
        {"target_modules": (".*q_proj",)},
        ("target_modules", 0),
        '".*q_proj" is no module',
        "a regular expression is one text, not in a list: target_modules = '.*q_proj'",
    ),
    "a pattern misspelt": ({"target_modules": ".*q_prj"}, ("target_modules",), "fits no module", '"q_proj"'),
    "no pattern": ({"target_modules": ".*(q|v"}, ("target_modules",), "is no regular expression: missing )", "list"),
    "a pattern for too much": (
        {"target_modules": r".*self_attn.*"},
        ("target_modules",),
        "the expression means model.layers.0.self_attn, a LlamaAttention",
        "q_proj",
    ),
    "all-linear misspelt": (
        {"target_modules": "all_linear"},
        ("target_modules",),
        "fits no module",
        'did you mean "all-linear"?',
    ),
    "in both": (
        {"target_modules": ("q_proj", "lm_head"), "modules_to_save": ("lm_head",)},
        ("target_modules", 1),
        "is trained whole by modules_to_save, so its adapter would have no effect",
        "name it in one of the two",
    ),
    "inside of a saved one": (
        {"target_modules": ("gate_proj",), "modules_to_save": ("mlp",)},
        ("target_modules", 0),
        "would have no effect",
        "one of the two",
    ),
    "a list of blocks": (
        {"modules_to_save": ("norm", "layers")},
        ("modules_to_save", 1),
        '"layers" holds whole blocks, such as model.layers.0',
        'name = "full"',
    ),
    "one block": ({"modules_to_save": ("layers.1",)}, ("modules_to_save", 0), "holds whole blocks", "layers in them"),
    "saved twice": (
        {"modules_to_save": ("mlp", "up_proj")},
        ("modules_to_save",),
        "names model.layers.0.mlp and, inside of it, model.layers.0.mlp.up_proj",
        "leave one of the two out",
    ),
    "DoRA on an embedding": (
        {"target_modules": ("q_proj", "embed_tokens"), "dora": True},
        ("target_modules", 1),
        "means model.embed_tokens: embeddings and the head take no DoRA",
        "dora = false",
    ),
    "DoRA on the head": (
        {"target_modules": ".*(q_proj|lm_head)", "dora": True},
        ("target_modules",),
        "means lm_head: embeddings and the head take no DoRA",
        "dora = false",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_name_that_cannot_be_meant_is_refused_with_the_nearest(case: str) -> None:
    settings, key, message, fix = WRONG[case]
    ((at, told, help_),) = said(LLAMA, **settings)
    assert at == key
    assert message in told
    assert fix in help_


def test_every_wrong_name_is_said_at_once() -> None:
    found = said(LLAMA, target_modules=("q_prj", "v_prj", "o_proj"), modules_to_save=("nrom",))
    assert [at for at, *_ in found] == [("target_modules", 0), ("target_modules", 1), ("modules_to_save", 0)]
    assert 'did you mean "norm"' in found[2][2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj")},
        {"target_modules": ("embed_tokens", "lm_head")},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": ".*_proj", "modules_to_save": ("norm", "lm_head")},
        {"modules_to_save": ("mlp",)},
    ],
)
def test_what_matches_is_right(settings: dict[str, Any]) -> None:
    assert said(LLAMA, **settings) == []


def test_transposed_layers_are_layers() -> None:
    assert said(GPT2, target_modules=("c_attn", "wte", "wpe")) == []
    ((_, message, fix),) = said(GPT2, target_modules=("q_proj",))
    assert '"q_proj" is no module' in message
    assert "c_proj" in fix


def test_what_is_stored_in_4_bits_cannot_be_trained_whole() -> None:
    lm = targets.listing(skeleton.build(LLAMA))
    (fault,) = targets.faults(lm, QloraParams(modules_to_save=("norm", "lm_head", "mlp")))
    assert fault.key == ("method", "modules_to_save", 2)
    assert "stored in 4 bits" in fault.message
    assert targets.faults(lm, QloraParams(modules_to_save=("norm", "lm_head", "embed_tokens"))) == []


def test_a_saved_name_means_no_longer_names_with_its_end() -> None:
    """PEFT alone would train every input_layernorm for "layernorm", and for "norm" all norms there are."""
    from torch import float32

    from distft.model.adapters import lora

    wrapped = lora.attach(skeleton.build(LLAMA), LoraParams(modules_to_save=("norm",)), float32)
    whole = [name for name, param in wrapped.named_parameters() if param.requires_grad and "lora_" not in name]
    assert whole == ["base_model.model.model.norm.modules_to_save.default.weight"]


def test_a_listing_can_be_kept() -> None:
    listed = targets.listing(skeleton.build(GPT2))
    assert targets.Listing.from_json(json.loads(json.dumps(listed.to_json()))) == listed


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({}, False),
        ({"target_modules": ("q_proj",)}, False),
        ({"target_modules": ("layers.1.mlp.up_proj",)}, True),
        ({"target_modules": r".*layers\.[01]\..*q_proj"}, True),
        ({"modules_to_save": ("layers.0.mlp",)}, True),
    ],
)
def test_whether_blocks_may_differ(settings: dict[str, Any], differs: bool) -> None:
    assert targets.name_blocks(LoraParams(**settings)) == differs
