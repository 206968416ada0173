"""Weights: nothing whole is built, everything is filled, the same values whoever asks and in whatever order."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import CPU, batch, build, documents
from transformers import AutoModelForCausalLM, LlamaConfig

from distft.core.errors import MachineError, RecipeError
from distft.core.optional import why_not
from distft.model import load, stats
from distft.model.attention import choose
from distft.model.paths import VARLEN
from distft.model.quantize import is_4bit
from distft.model.random_weights import RandomSource
from distft.recipe import ModelTable

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                        "num_attention_heads": 64}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that plain transformers wrote, with tied embeddings and several weight files."""
    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def test_pretrained_equals_plain_transformers(saved: Path) -> None:
    ours, theirs = build(saved, init="pretrained"), AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor(documents([12])[0])[None]
    ours.module.transformer.set_attn_implementation("eager")
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(ours.module.transformer(ids).logits, theirs(ids).logits)
    lm = ours.module.transformer
    assert lm.lm_head.weight is lm.model.embed_tokens.weight, "tied tensors stay tied"


def test_filling_block_by_block_gives_the_same_weights_as_all_at_once(saved: Path, tiny_config: Path) -> None:
    for folder, init in ((saved, "pretrained"), (tiny_config, "random")):
        for method in ("full", "lora", "qlora"):
            at_once = build(folder, method, init=init)
            stepwise = build(folder, method, init=init, fill=False)
            assert all(p.is_meta for p in stepwise.module.parameters())
            for unit in [*reversed(stepwise.blocks), stepwise.module]:
                stepwise.fill(unit, CPU)
            ours, theirs = (dict(m.module.named_parameters()) for m in (stepwise, at_once))
            assert ours.keys() == theirs.keys()
            for name, param in ours.items():
                bits = param.data.contiguous().view(torch.uint8)  # packed 4-bit values may read as NaN
                assert torch.equal(bits, theirs[name].data.contiguous().view(torch.uint8)), (method, name)
                assert param.requires_grad == theirs[name].requires_grad


def test_random_weights_follow_the_architectures_own_rule(tiny_config: Path) -> None:
    module = build(tiny_config, seed=3).module.transformer
    assert 0.045 < module.model.layers[0].mlp.up_proj.weight.std() < 0.055  # initializer_range
    assert torch.equal(module.model.norm.weight, torch.ones(64))
    assert not torch.equal(module.model.layers[0].mlp.up_proj.weight, module.model.layers[1].mlp.up_proj.weight)
    other = build(tiny_config, seed=4).module.transformer
    assert not torch.equal(module.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("config", "method", "params", "cross"),
    [
        ({}, "full", {}, ["Embedding", "Linear"]),
        ({}, "lora", {}, ["Embedding", "Linear"]),
        ({"tie_word_embeddings": True}, "full", {}, []),
        ({}, "lora", {"target_modules": ["q_proj", "lm_head"]}, []),
        ({}, "lora", {"modules_to_save": ["lm_head"]}, ["Embedding", "Linear"]),
    ],
    ids=["untied", "frozen", "tied", "adapted", "saved"],
)
def test_embedding_and_head_are_units_where_nothing_else_touches_their_weights(
    tiny_config: Path, tmp_path: Path, config: dict, method: str, params: dict, cross: list[str]
) -> None:
    raw = json.loads((tiny_config / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | config))
    ends = build(tmp_path, method, fill=False, params=params).ends
    assert [type(end).__name__ for end in ends] == cross


def test_rotary_frequencies_are_real(tiny_config: Path) -> None:
    for name, buffer in build(tiny_config).module.named_buffers():
        assert not buffer.is_meta, name
        assert buffer.isfinite().all()
        assert buffer.any(), name


@pytest.mark.parametrize(
    ("config", "total"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)], ids=["8B", "70B"]
)
def test_parameter_counts_on_the_meta_device(tmp_path: Path, config: dict, total: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(tmp_path, fill=False, dtype="bfloat16")
    assert stats.count(model.module) == stats.Counts(total=total, trainable=total)
    assert len(model.blocks) == config["num_hidden_layers"]
    adapted = build(tmp_path, "lora", fill=False, dtype="bfloat16", params={"r": 16})
    per_layer = 16 * sum(
        a + b
        for a, b in [
            (config["hidden_size"], config["hidden_size"]),  # q, o
            (config["hidden_size"], config["hidden_size"]),
            (config["hidden_size"], 1024),  # k, v
            (config["hidden_size"], 1024),
            (config["hidden_size"], config["intermediate_size"]),  # gate, up, down
            (config["hidden_size"], config["intermediate_size"]),
            (config["intermediate_size"], config["hidden_size"]),
        ]
    )
    trainable = per_layer * config["num_hidden_layers"]
    assert stats.count(adapted.module) == stats.Counts(total=total + trainable, trainable=trainable)
    # 6N without embeddings' look-up for full; 4N + 6N_adapter with a frozen base
    embedding = config["vocab_size"] * config["hidden_size"]
    assert stats.flops_per_token(model.module) == pytest.approx(6 * (total - embedding), rel=1e-4)
    assert stats.flops_per_token(adapted.module) == pytest.approx(4 * (total - embedding) + 6 * trainable, rel=1e-4)


def test_qlora_stores_four_bits_and_evaluation_does_not_touch_them(tiny_config: Path) -> None:
    model = build(tiny_config, "qlora", params={"r": 4})
    packed = {n: m for n, m in model.module.named_modules() if is_4bit(m)}
    assert len(packed) == 14
    before = {n: (m.weight.data.clone(), m.weight.quant_state.absmax.clone()) for n, m in packed.items()}
    model.module.eval()
    with torch.no_grad():
        first = model.module(**batch(documents([30])).inputs())
        again = model.module(**batch(documents([30])).inputs())
    assert torch.equal(first, again)
    for name, layer in packed.items():
        assert torch.equal(layer.weight.data.view(torch.uint8), before[name][0].view(torch.uint8)), name
        assert torch.equal(layer.weight.quant_state.absmax, before[name][1]), name
    assert model.module.transformer.lm_head.weight.dtype == torch.float32, "no 4-bit head"


# -- what a user can get wrong ---------------------------------------------------------------------------------------


def copied(saved: Path, target: Path) -> Path:
    shutil.copytree(saved, target)
    return target


@pytest.mark.row(37)
def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"only pickled weights \(pytorch_model.bin\), which can run code"):
        build(folder, init="pretrained")


@pytest.mark.row(33)
def test_missing_weights_shards_and_folders(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "broken")
    gone = sorted(folder.glob("model-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(RecipeError, match=f"the index names files that are not there: {gone.name}"):
        build(folder, init="pretrained")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(RecipeError, match=r"the folder has no config\.json"):
        load.find_folder(ModelTable(path=str(bare)))
    with pytest.raises(RecipeError, match="no such folder"):
        load.find_folder(ModelTable(path=str(tmp_path / "nowhere")))
    shutil.copy(saved / "config.json", bare)
    with pytest.raises(RecipeError, match=r'no \*.safetensors weights .*init = "random"'):
        build(bare, init="pretrained")


def test_weights_of_another_model(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(RecipeError, match=r"the weights lack 9 tensors that the config asks for, first model.layers.3"):
        build(folder, init="pretrained")
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(RecipeError, match=r"safetensors: .*_proj.weight has shape .* config.json asks for \("):
        build(folder, init="pretrained")


@pytest.mark.row(39)
def test_remote_code_is_not_run(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    remote = config | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(remote | {"model_type": "evil"}))
    with pytest.raises(RecipeError, match="the model brings its own code, which is not run"):
        build(folder, init="pretrained")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(RecipeError, match="transformers does not know model_type 'evil'"):
        build(folder, init="pretrained")
    (folder / "config.json").write_text(json.dumps(remote))
    native = build(folder, init="pretrained").module.transformer
    assert type(native).__module__.startswith("transformers."), "a model_type that transformers knows needs no code"
    assert not hasattr(native.config, "auto_map"), "final/ does not name code that it does not hold"


def test_flash_says_what_it_needs(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r'attention = "flash" cannot run here: it needs a CUDA device; use "auto"'):
        build(tiny_config, attention="flash")
    cuda, half = torch.device("cuda", 0), torch.bfloat16
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(MachineError, match=r"needs compute capability 8\.0, Tesla T4 has 7\.5"):
        choose("flash", cuda, half)
    assert choose("auto", cuda, half) == "sdpa"
    capability = (9, 0)
    with pytest.raises(MachineError, match="flash_attn is not installed"):
        choose("flash", cuda, half)
    assert choose("auto", cuda, half, head_size=128) == VARLEN
    for head_size in (260, 100):
        with pytest.raises(MachineError, match=f"takes heads of 8, 16, ... 256, this model's have {head_size}"):
            choose("flash", cuda, half, head_size=head_size)
        assert choose("auto", cuda, half, head_size=head_size) == "sdpa"
    (tmp_path / "flash_attn.py").write_text('raise ImportError("flash_attn_2_cuda.so: undefined symbol")')
    monkeypatch.syspath_prepend(tmp_path)
    why_not.cache_clear()
    with pytest.raises(MachineError, match=r"flash_attn cannot be imported: flash_attn_2_cuda\.so: undefined symbol"):
        choose("flash", cuda, half, head_size=128)
    assert choose("auto", cuda, half, head_size=128) == VARLEN, "a broken package is no reason to stop"
    (tmp_path / "flash_attn.py").write_text("")
    why_not.cache_clear()
    assert choose("auto", cuda, half, head_size=128) == "flash_attention_2"
    assert choose("auto", cuda, torch.float32) == VARLEN
    (tmp_path / "flash_attn_interface.py").write_text("")
    why_not.cache_clear()
    capability = (8, 9)
    assert choose("auto", cuda, half, head_size=128) == "flash_attention_2", "no kernels for this card"
    capability = (9, 0)
    for name in ("auto", "flash"):
        assert choose(name, cuda, half, head_size=128) == "flash_attention_3"
    (tmp_path / "flash_attn_interface.py").write_text('raise ImportError("no symbol")')
    sys.modules.pop("flash_attn_interface")
    why_not.cache_clear()
    assert choose("auto", cuda, half, head_size=128) == "flash_attention_2", "the next best"
    why_not.cache_clear()


def test_a_rule_that_initialises_several_modules_together_is_refused(tmp_path: Path) -> None:
    mamba = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(mamba | {"num_hidden_layers": 1, "state_size": 8}))
    with pytest.raises(MachineError, match=r'init = "random": .*MambaMixer together.*dt_proj.*init = "pretrained"'):
        build(tmp_path)


def test_a_parameter_that_only_a_constructor_initialises_is_refused(tmp_path: Path) -> None:
    """It was left as the memory happened to be: other numbers on each rank and in each run."""
    apertus = {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    (tmp_path / "config.json").write_text(
        json.dumps(apertus | {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2})
    )
    with pytest.raises(MachineError, match=r'no rule for .*mlp\.act_fn\.alpha_p of XIELU.*init = "pretrained"'):
        build(tmp_path)


def test_random_weights_are_drawn_on_the_cpu_whatever_the_device(tiny_config: Path) -> None:
    """Generators of other devices draw other numbers: a model would be another one on each kind of GPU."""
    lm = build(tiny_config, fill=False).module.transformer
    drawn_on: list[torch.device] = []
    source = RandomSource(lm, 0, torch.float32)
    init = source._init
    source._init = lambda module: (drawn_on.extend(p.device for p in module.parameters()), init(module))[1]
    made = source.values("model.layers.0.mlp.up_proj", lm.model.layers[0].mlp.up_proj, torch.device("meta"))
    assert {device.type for device in drawn_on} == {"cpu"}
    assert made["weight"].is_meta


def test_unprefixed_tensor_files_are_not_mistaken(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(RecipeError, match="belong to different models"):
        build(folder, init="pretrained")
