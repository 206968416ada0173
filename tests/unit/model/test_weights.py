"""Base weights: names by transformers' own rules, stored forms by the values they mean, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, build
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from distft.core.errors import RecipeError
from distft.model import quantize, stats
from distft.model.adapters import METHODS, lora
from distft.model.tensor_files import TensorFiles

BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = BASE | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": BASE,
    "gpt2": GPT2,
    "gpt_neox": {k: v for k, v in BASE.items() if k != "num_key_value_heads"},
    "opt": {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "qwen3_moe": MOE | {"head_dim": 8, "num_experts": 3},
    "mixtral": BASE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": BASE | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": None,
                       "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v3": MOE | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                          "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
                          "n_shared_experts": 1, "num_key_value_heads": 4},
    "glm4_moe": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "granitemoe": BASE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": BASE | {"num_experts": 3, "num_experts_per_tok": 2},
    "phimoe": BASE | {"num_local_experts": 3, "num_experts_per_tok": 2},
}  # fmt: skip
"""Prefixes, renamings, experts fused on load, buffers that belong to the weights."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder that plain transformers wrote, made once; weights wide enough to tell them apart."""
    made: dict[str, Path] = {}

    def folder(kind: str, **settings) -> Path:
        key = kind + json.dumps(settings)
        if key not in made:
            torch.manual_seed(3)
            lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**ARCHITECTURES[kind] | settings))
            for name, buffer in lm.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_()
            made[key] = tmp_path_factory.mktemp(kind)
            lm.save_pretrained(made[key])
        return made[key]

    return folder


def altered(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object], **config) -> Path:
    """A copy of a folder with other tensors and other keys in its config."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(told))
    return target


def loaded(folder: Path, **how) -> dict[str, Tensor]:
    return build(folder, init="pretrained", attention="eager", **how).module.transformer.state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **close) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float(), **({"rtol": 0, "atol": 0} | close), msg=name)


def plain(folder: Path, **how) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).state_dict()


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_are_those_that_transformers_loads(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    same(loaded(folder), plain(folder))


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gpt2", "transformer."), ("gpt_neox", "gpt_neox."), ("opt", "model."), ("llama", "model.")]
)
def test_files_without_the_base_model_s_prefix(
    saved: Callable[..., Path], tmp_path: Path, kind: str, prefix: str
) -> None:
    def stripped(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    folder = altered(saved(kind), tmp_path / "bare", stripped)
    same(loaded(folder), plain(saved(kind)))


def test_tensors_that_transformers_leaves_out_by_rule(saved: Callable[..., Path], tmp_path: Path) -> None:
    def older(tensors: dict[str, Tensor]) -> None:
        for block in range(2):
            tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = altered(saved("llama"), tmp_path / "old", older)
    same(loaded(folder), plain(saved("llama")))
    # GPT-2's hub files carry the causal mask of every block, DeepSeek's a block that predicts a second token.
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64) for block in range(2)}
    same(loaded(altered(saved("gpt2"), tmp_path / "masks", lambda t: t.update(masks))), plain(saved("gpt2")))


def test_a_routing_bias_stays_in_fp32_beside_bf16_weights(saved: Callable[..., Path]) -> None:
    right = AutoModelForCausalLM.from_pretrained(saved("deepseek_v3"), dtype=torch.bfloat16)
    ours = build(saved("deepseek_v3"), init="pretrained", attention="eager", dtype="bfloat16").module.transformer
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    theirs = dict(right.named_buffers())[name]
    assert theirs.dtype == torch.float32
    assert theirs.any()
    assert torch.equal(dict(ours.named_buffers())[name], theirs)


def test_tied_tensors(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    right = plain(source)
    head_only = altered(source, tmp_path / "head", lambda t: t.update({head: t.pop(embedding)}))
    both = altered(source, tmp_path / "both", lambda t: t.update({head: t[embedding].clone()}))
    for folder in (source, head_only, both):
        model = build(folder, init="pretrained").module.transformer
        same(model.state_dict(), right)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    differ = altered(source, tmp_path / "differ", lambda t: t.update({head: t[embedding] + 1}))
    with pytest.raises(RecipeError, match=r"ties lm_head.weight to model.embed_tokens.weight, .* which differ"):
        loaded(differ)
    untied = altered(saved("llama"), tmp_path / "untied", lambda t: t.pop(head))
    with pytest.raises(RecipeError, match=r"lack 1 tensor that the config asks for, first lm_head.weight"):
        loaded(untied)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors that are read from now on."""
    read: list[str] = []
    whole = TensorFiles.read

    def noting(self: TensorFiles, name: str) -> Tensor:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(TensorFiles, "read", noting)
    return read


def test_a_block_reads_its_own_tensors_only(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("llama", "mixtral", "deepseek_v3"):
        model = build(saved(kind), init="pretrained", attention="eager", fill=False)
        read = spied(monkeypatch)
        for number, block in enumerate(model.blocks):
            model.fill(block, CPU)
            assert read, kind
            assert all(f"layers.{number}." in name for name in read), (kind, read)
            assert len(read) == len(set(read)), "nothing is read twice"
            read.clear()
        monkeypatch.undo()


# -- stored forms ----------------------------------------------------------------------------------------------------


def test_fp8_blocks(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks of 16 x 20 over sizes they do not divide; the reference multiplies element by element."""
    right: dict[str, Tensor] = {}

    def stored(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            rows, columns = tensors[name].shape
            scales = torch.rand(-(-rows // 16), -(-columns // 20)) + 0.5
            packed = (tensors[name] * 100).to(torch.float8_e4m3fn)
            right[name] = torch.tensor(
                [[packed[r, c].item() * scales[r // 16, c // 20].item() for c in range(columns)] for r in range(rows)]
            )
            tensors[name], tensors[f"{name}_scale_inv"] = packed, scales

    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 20]}
    folder = altered(saved("llama"), tmp_path / "fp8", stored, quantization_config=told)
    same(loaded(folder), plain(saved("llama")) | right, rtol=1e-6, atol=1e-6)
    model = build(folder, init="pretrained", fill=False).module.transformer
    assert "quantization_config" not in model.config.to_dict(), "final/ does not claim what is gone"
    # of experts, which are fused after they are dequantised
    right.clear()
    folder = altered(saved("qwen3_moe"), tmp_path / "moe", stored, quantization_config=told)
    ours = loaded(folder)
    for expert in range(3):
        at = "model.layers.1.mlp.experts"
        gate, up = (right[f"{at}.{expert}.{name}_proj.weight"] for name in ("gate", "up"))
        torch.testing.assert_close(ours[f"{at}.gate_up_proj"][expert], torch.cat([gate, up]))
    # scales that do not lie over the weight, weights without scales, scales without a config
    told["weight_block_size"] = [128, 128]
    wrong = altered(saved("llama"), tmp_path / "wrong", stored, quantization_config=told)
    with pytest.raises(RecipeError, match=r"model.safetensors: .*_scale_inv has shape .* blocks of \(128, 128\)"):
        loaded(wrong)
    with pytest.raises(RecipeError, match="stored as F8_E4M3, without the scales"):
        loaded(altered(saved("llama"), tmp_path / "unsaid", stored))


def test_mxfp4_experts_are_what_transformers_dequantises(saved: Callable[..., Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def stored(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, rows, columns = tensors.pop(name).shape  # stored transposed, 32 values to a scale
            shape = (experts, columns, rows // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)

    source = saved("gpt_oss", intermediate_size=64)
    folder = altered(source, tmp_path / "mxfp4", stored, quantization_config={"quant_method": "mxfp4"})
    same(loaded(folder), plain(folder))


def test_bitsandbytes(saved: Callable[..., Path], tmp_path: Path) -> None:
    from bitsandbytes import functional

    right: dict[str, Tensor] = {}

    def four(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            packed, state = functional.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
            right[name] = functional.dequantize_4bit(packed, state)
            tensors[name] = packed
            tensors.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})

    def eight(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            scale = tensors[name].abs().amax(1)
            whole = (tensors[name] / scale[:, None] * 127).round().to(torch.int8)
            right[name] = whole.float() * scale[:, None] / 127
            tensors[name], tensors[f"{name.removesuffix('weight')}SCB"] = whole, scale
            tensors[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    for change, told in ((four, {"load_in_4bit": True}), (eight, {"load_in_8bit": True})):
        right.clear()
        said = {"quant_method": "bitsandbytes"} | told
        folder = altered(saved("llama"), tmp_path / change.__name__, change, quantization_config=said)
        same(loaded(folder), plain(saved("llama")) | right, rtol=1e-6, atol=1e-7)


def test_compressed_tensors_of_eight_bits(saved: Callable[..., Path], tmp_path: Path) -> None:
    right: dict[str, Tensor] = {}

    def rows(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            scale = tensors[name].abs().amax(1, keepdim=True) / 127
            whole = (tensors[name] / scale).round().to(torch.int8)
            right[name] = whole.float() * scale
            tensors[name], tensors[f"{name}_scale"] = whole, scale

    group = {"weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"}, "targets": ["Linear"]}
    told = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    folder = altered(saved("llama"), tmp_path / "rows", rows, quantization_config=told)
    same(loaded(folder), plain(saved("llama")) | right, rtol=1e-6, atol=1e-7)
    packed = told | {"format": "pack-quantized"}
    with pytest.raises(RecipeError, match="stored as compressed-tensors pack-quantized"):
        loaded(altered(saved("llama"), tmp_path / "packed", rows, quantization_config=packed))


@pytest.mark.parametrize(
    "told", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"bits": 4}, {"quant_method": "fp8"}]
)
def test_other_stored_forms_are_refused_by_name(saved: Callable[..., Path], tmp_path: Path, told: dict) -> None:
    folder = altered(saved("llama"), tmp_path / "stored", lambda tensors: None, quantization_config=told)
    with pytest.raises(RecipeError, match=told.get("quant_method", "without a quant_method")):
        loaded(folder)


# -- damage ----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    data = (saved("llama") / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n"
    cases = {
        "cut": (data[: len(data) * 2 // 3], "the file is cut"),
        "header": (data[:100], "ends inside its header"),
        "longer": (data + b"x", "longer than its header says"),
        "empty": (b"", "the file is empty"),
        "pointer": (pointer, "a Git LFS pointer"),
        "html": (b"<!DOCTYPE html><html>not found</html>" * 10, "not a safetensors file"),
        "json": ((2).to_bytes(8, "little") + b"[]", "the header is not safetensors'"),
    }
    for name, (content, said) in cases.items():
        folder = tmp_path / name
        shutil.copytree(saved("llama"), folder)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(RecipeError, match=f"{name}/model.safetensors: .*{said}"):
            loaded(folder)


def test_shards(saved: Callable[..., Path], tmp_path: Path) -> None:
    source, right = saved("mixtral"), plain(saved("mixtral"))
    folder = tmp_path / "shards"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(source / "model.safetensors")
    halves: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, value) in enumerate(sorted(tensors.items())):  # experts of one block lie in both
        halves[number % 2][name] = value
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for half, file in zip(halves, files, strict=True):
        save_file(half, folder / file)
    same(loaded(folder), right)
    index = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    named = folder / "model.safetensors.index.json"
    named.write_text(json.dumps({"weight_map": index}))
    same(loaded(folder), right)
    first = next(iter(halves[0]))
    named.write_text(json.dumps({"weight_map": index | {first: files[1]}}))
    with pytest.raises(RecipeError, match=f"says that {first} is in {files[1]}, which does not hold it"):
        loaded(folder)
    named.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RecipeError, match=r"index.json: a Git LFS pointer"):
        loaded(folder)
    named.unlink()
    save_file(halves[1] | {first: halves[0][first]}, folder / files[1])
    with pytest.raises(RecipeError, match=f"{first} is in .*{files[0]} and in .*{files[1]}"):
        loaded(folder)
    (folder / files[1]).unlink()
    with pytest.raises(RecipeError, match=r"of 2 shards these are not there: 2"):
        loaded(folder)
    (folder / files[0]).rename(folder / "weights.safetensors")
    with pytest.raises(RecipeError, match=r"other names than transformers gives them: weights.safetensors"):
        loaded(folder)


def test_values_that_cannot_be_meant(saved: Callable[..., Path], tmp_path: Path) -> None:
    at = "model.layers.1.mlp.up_proj.weight"

    def with_one(value: float) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: tensors[at].view(-1).__setitem__(7, value)

    for name, value, said in (("nan", float("nan"), "NaN"), ("inf", float("-inf"), "infinite values")):
        folder = altered(saved("llama"), tmp_path / name, with_one(value))
        with pytest.raises(RecipeError, match=f"{name}/model.safetensors: {at} holds {said}"):
            loaded(folder)
    large = altered(saved("llama"), tmp_path / "large", with_one(3.4e38))
    with pytest.raises(RecipeError, match=f"{at} holds infinite values .*bfloat16"):
        loaded(large, dtype="bfloat16")
    extra = {f"model.layers.{block}.mlp.fourth_proj.weight": torch.ones(2) for block in range(8)}
    folder = altered(saved("llama"), tmp_path / "extra", lambda tensors: tensors.update(extra))
    with pytest.raises(
        RecipeError, match=r"has no place for 8 tensors of the files: .*fourth_proj.weight.* and 2 more"
    ):
        loaded(folder)
    whole = altered(saved("llama"), tmp_path / "int", lambda t: t.update({at: t[at].to(torch.int8)}))
    with pytest.raises(RecipeError, match=f"{at} is stored as I8, and config.json has no quantization_config"):
        loaded(whole)
    experts = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    with pytest.raises(RecipeError, match=r"model.safetensors: .*down_proj cannot be made of|down_proj has shape"):
        loaded(altered(saved("mixtral"), tmp_path / "less", lambda tensors: tensors.pop(experts)))


# -- four bits -------------------------------------------------------------------------------------------------------


def test_conv1d_and_experts_are_stored_in_four_bits(saved: Callable[..., Path]) -> None:
    from bitsandbytes import functional

    for kind, names in {
        "gpt2": ["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"],
        "gpt_oss": ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"],
        "qwen3_moe": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"],
    }.items():
        right = plain(saved(kind))
        model = build(saved(kind), "qlora", init="pretrained", attention="eager", fill=False, params={"r": 2})
        counted = quantize.count(model.module)
        assert 0.2 < counted.four_bit / counted.whole < 1, (kind, counted)
        model.fill(model.module, CPU)
        base_name, modules = METHODS["qlora"].base_name, model.module.lm.named_modules()
        named = {base_name(f"{name}.x").removesuffix(".x"): module for name, module in modules}
        for name in names:
            module = named[name.rpartition(".")[0]]
            short = name.rpartition(".")[2]
            state = module.quant_states[short] if short != "weight" else module.weight.quant_state
            held = functional.dequantize_4bit(module._parameters[short].data, state)
            value = right[name].T.contiguous() if kind == "gpt2" else right[name]
            again = functional.dequantize_4bit(
                *functional.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
            )
            assert torch.equal(held, again), (kind, name)
            assert module._parameters[short].numel() * module._parameters[short].element_size() == value.numel() // 2


def test_an_architecture_whose_matrices_would_stay_in_16_bits(tmp_path: Path) -> None:
    ffn = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
    CONFIG_MAPPING["dbrx"](
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128, ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"of DbrxForCausalLM's blocks would stay in 16 bits \(0.00 GiB\), first .*w1"
    ):
        build(tmp_path, "qlora", attention="eager", fill=False)


# -- adapters and counts ---------------------------------------------------------------------------------------------


def test_which_experts_get_adapters(saved: Callable[..., Path]) -> None:
    def adapted(kind: str, **params) -> tuple[int, int]:
        model = build(saved(kind), "lora", attention="eager", fill=False, params={"r": 2} | params)
        for name, param in model.module.named_parameters():
            assert param.requires_grad == (".lora_" in name), name
        return lora.adapted_layers(model.module)

    assert adapted("gpt_oss") == (8, 4)
    assert adapted("gpt_oss", target_modules=["q_proj", "v_proj"]) == (4, 0), "attention alone, if the recipe says so"
    assert adapted("gpt_oss", target_modules=["q_proj", "experts.down_proj"]) == (2, 2)
    named = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    assert adapted("gpt_oss", **named) == (2, 2), "by a key of its own"
    assert adapted("qwen3_moe") == (10, 4), "with the routers, as PEFT does by default"
    assert adapted("mixtral", target_modules=["q_proj"]) == (2, 0)
    assert adapted("granitemoe")[1] == 4
    assert adapted("llama") == (14, 0)
    assert adapted("gpt2") == (8, 0)
    for params, said in (({"dropout": 0.1}, "dropout"), ({"dora": True}, "dora")):
        with pytest.raises(RecipeError, match=rf"\[method\] {said}: GptOssForCausalLM holds its experts as tensors"):
            adapted("gpt_oss", **params)
        assert adapted("gpt_oss", target_modules=["q_proj"], **params) == (2, 0)


def test_a_token_meets_the_experts_that_it_is_sent_to(saved: Callable[..., Path]) -> None:
    model = build(saved("qwen3_moe"), fill=False, attention="eager").module
    expert = 3 * 32 * 16  # gate, up, down; three of them, of which a token is sent to two
    attention, router = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32
    assert stats.active(model) == stats.count(model).total - 2 * expert
    assert stats.flops_per_token(model) == 6 * (2 * (attention + router + 2 * expert) + 128 * 32)
    with_adapters = build(saved("qwen3_moe"), "lora", fill=False, attention="eager", params={"r": 2}).module
    per_block = 2 * (2 * (32 + 32) + 2 * (32 + 16)) + 2 * (32 + 3)  # attention and router
    per_expert = 4 * (32 + 32) + 2 * (16 + 32)  # PEFT doubles the rank where gate and up are one tensor
    trained = 2 * (per_block + 2 * per_expert)
    frozen = stats.flops_per_token(model) * 4 / 6
    assert stats.flops_per_token(with_adapters) == pytest.approx(frozen + 6 * trained)
