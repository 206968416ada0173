"""LoRA that knows its low-bit format: the grids are the writers', and the exported model is the trained one."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from export_kit import byte_level, save_tokenizer
from tiny import batch, build
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from distft.core.errors import DistftError
from distft.export_formats import llm_compressor
from distft.export_formats.gguf_levels import LEVELS
from distft.export_formats.gguf_writer import write_gguf
from distft.export_formats.llm_compressor import Rounding
from distft.merging.base_model import TrainedIn4bit
from distft.merging.merging import MergeSource, merge
from distft.model.adapters import METHODS, deploy_grids
from distft.model.adapters.deploy import deployed_weight
from distft.model.adapters.lora import base_alone
from distft.model.quant_params import QuantParams
from distft.model.quantize import keep_layout

EXAMPLE = batch([[5, 9, 300, 447, 17, 22, 900, 4], [8, 447, 77, 600]])


def matrices() -> list[torch.Tensor]:
    torch.manual_seed(0)
    plain = torch.randn(24, 256)
    edges = plain.clone()
    edges[0], edges[1, :32], edges[2, ::2] = 0.0, 0.5, -edges[2, 1::2]  # zeros, all alike, pairs of equal size
    return [plain, edges, plain * 1e-6, plain.bfloat16(), torch.linspace(-1, 1, 512).reshape(2, 256)]


@pytest.mark.parametrize("level", ["Q8_0", "Q4_0"])
def test_ggmls_grids_are_those_of_its_writer(level: str) -> None:
    kind = gguf.GGMLQuantizationType[level]
    for matrix in matrices():
        stored = gguf.quantize(matrix.float().numpy(), kind)
        wanted = torch.from_numpy(gguf.dequantize(stored, kind).astype(np.float32)).to(matrix.dtype)
        assert torch.equal(deploy_grids.GRIDS[level.lower()].on(matrix), wanted)


def test_nf4_is_that_of_bitsandbytes() -> None:
    for matrix in matrices():
        packed, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
        assert torch.equal(deploy_grids.GRIDS["nf4"].on(matrix), functional.dequantize_4bit(packed, state))


def test_int4_is_that_of_compressed_tensors() -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="an export of its own environment")
    args = library.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
    fake = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    for matrix in matrices():
        groups = matrix.unflatten(-1, (-1, 128))
        scale, zero = qparams(groups.amin(-1), groups.amax(-1), args)
        assert torch.equal(deploy_grids.GRIDS["int4"].on(matrix), fake(matrix, scale, zero, args))


@pytest.fixture(scope="module", params=["own head", "tied head"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param == "tied head", initializer_range=0.15,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(byte_level(), folder)
    return folder


def trained(base: Path, deploy: str, method: str = "lora", **params: Any) -> Any:
    model = build(base, method, init="pretrained", params={"r": 4, "deploy": deploy, **params})
    ours = [param for param in model.module.parameters() if param.requires_grad]
    step = torch.optim.AdamW(ours, lr=1e-2)
    losses = []
    for _ in range(4):
        step.zero_grad()
        loss = model.module(**EXAMPLE.inputs()).sum()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model


def exported(base: Path, model: Any, deploy: str, folder: Path) -> Any:
    """The model as its file holds it: merged, written by the format's writer, read by transformers."""
    adapter, merged = folder / "adapter", folder / "merged"
    own = {name: param.detach() for name, param in model.module.lm.named_parameters() if param.requires_grad}
    METHODS["lora"].save_adapter(model.module.lm, adapter, own)
    merge(MergeSource(adapter=adapter, base=base), merged, rows=None)
    if deploy == "merged alone":
        return None
    if deploy == "nf4":
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
        lm = AutoModelForCausalLM.from_pretrained(merged, quantization_config=bits, dtype=torch.float32)
        for layer in lm.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack anew, see distft.model.quantize
                layer.support_avx512bf16_for_cpu = False
        return lm
    write_gguf(merged, folder / "m.gguf", LEVELS[deploy.upper()], name="m",
               tokenizer=AutoTokenizer.from_pretrained(base), stop_ids=(1,))  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)


def test_an_exported_int4_folder_is_the_trained_model(base: Path, tmp_path: Path) -> None:
    """By llm-compressor, in an environment that has it (see CONTRIBUTING.md)."""
    if reason := llm_compressor.missing():
        pytest.skip(reason)
    model = trained(base, "int4")
    exported(base, model, "merged alone", tmp_path)
    how = Rounding(method="nearest", bits=4, group_size=deploy_grids.INT4_GROUP)
    (tmp_path / "int4").mkdir()
    llm_compressor.round_model(tmp_path / "merged", tmp_path / "int4", how, ())
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model.module(**EXAMPLE.inputs()).sum(), plain_loss(lm), rtol=1e-5)
    layers = [name for name, layer in model.module.transformer.named_modules() if hasattr(layer, "lora_A")]
    for name in layers:
        ours, theirs = deployed(model.module.transformer.get_submodule(name), "int4"), lm.get_submodule(name).weight
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("deploy", ["q8_0", "q4_0", "nf4"])
def test_the_exported_model_is_the_trained_one(base: Path, tmp_path: Path, deploy: str) -> None:
    """Every weight bit for bit; what was trained without rounding is another model."""
    model = trained(base, deploy)
    lm = exported(base, model, deploy, tmp_path).eval()
    modules = dict(model.module.transformer.named_modules())
    for name, param in lm.named_parameters():
        module, _, short = name.rpartition(".")
        holder = modules[module]
        ours = deployed(holder, deploy) if hasattr(holder, "lora_A") else holder.get_parameter(short)
        theirs = functional.dequantize_4bit(param.data, param.quant_state) if hasattr(param, "quant_state") else param
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        ours, unrounded = model.module(**EXAMPLE.inputs()).sum(), plain_loss(exported_plain(base, model, tmp_path))
        assert torch.allclose(ours, plain_loss(lm), rtol=1e-5)
        assert abs(unrounded / ours - 1) > 1e-4, "rounding matters here"
        with base_alone(model.module):
            alone = model.module(**EXAMPLE.inputs()).sum()
        fresh = build(base, "lora", init="pretrained", params={"r": 4, "deploy": deploy})
        assert torch.allclose(alone, fresh.module(**EXAMPLE.inputs()).sum(), rtol=1e-6), "a reference is rounded too"


def exported_plain(base: Path, model: Any, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()


def deployed(layer: Any, deploy: str) -> torch.Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.get_base_layer().weight
    return deployed_weight(weight, a, b, layer.scaling["default"], deploy_grids.GRIDS[deploy])


def plain_loss(lm: Any) -> torch.Tensor:
    total = torch.zeros(())
    for start, end in ((0, 8), (8, 12)):
        ids = EXAMPLE.input_ids_T[start:end]
        logits = lm(input_ids=ids[None]).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    return total


def test_gradients_are_those_of_the_rounded_weight_passed_straight_through(base: Path) -> None:
    """Against autograd through `w + (Q(w) - w).detach()`, layer by layer in a plain model."""
    model = trained(base, "q4_0")
    model.module.zero_grad()
    model.module(**EXAMPLE.inputs()).sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    grid, factors = deploy_grids.GRIDS["q4_0"], {}
    for name, layer in model.module.transformer.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        pair = [layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()]
        a, b = (factor.requires_grad_() for factor in pair)
        factors[name] = (a, b, layer)
        linear = plain.get_submodule(name)
        whole = linear.weight.detach() + (b * layer.scaling["default"]) @ a
        del linear.weight
        linear.weight = whole + (grid.on(whole.detach()) - whole.detach())
    with torch.no_grad():
        ours = model.module.transformer
        plain.get_input_embeddings().weight.copy_(ours.get_input_embeddings().weight)
        plain.get_output_embeddings().weight.copy_(ours.get_output_embeddings().weight)
    plain_loss(plain).backward()
    for name, (a, b, layer) in factors.items():
        for mine, factor in ((layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)):
            assert torch.allclose(mine.grad, factor.grad, rtol=1e-3, atol=1e-5 * factor.grad.abs().max().item()), name


WRONG = [
    ({"deploy": "q4_0", "dropout": 0.1}, {}, "which dropout does not leave as a sum"),
    ({"deploy": "q4_0", "init": "pissa"}, {}, "starts from another base"),
    ({"deploy": "int4"}, {"hidden": 64}, '"int4" stores 128 numbers of a row together, and .* has rows of 64'),
    ({"deploy": "q4_0", "trainable_tokens": ["a"]}, {}, '"q4_0" rounds the embedding, whose rows are trained'),
]


@pytest.mark.parametrize(("params", "config", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_no_writer_makes_is_refused(
    base: Path, tmp_path: Path, params: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    if config:
        narrow = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                             num_attention_heads=2, architectures=["LlamaForCausalLM"])  # fmt: skip
        narrow.save_pretrained(tmp_path)
    with pytest.raises((DistftError, ValueError), match=message):
        build(tmp_path if config else base, "lora", fill=False, init="pretrained" if not config else "random",
              params={"r": 4, **params})  # fmt: skip


def test_beside_a_base_in_4_bits_it_is_what_merging_into_4_bits_writes(base: Path, tmp_path: Path) -> None:
    model = trained(base, "nf4", method="qlora")
    own = {name: param.detach() for name, param in model.module.lm.named_parameters() if param.requires_grad}
    METHODS["qlora"].save_adapter(model.module.lm, tmp_path / "adapter", own)
    in_4bit = TrainedIn4bit(params=QuantParams(), dtype=torch.float32)
    source = MergeSource(adapter=tmp_path / "adapter", base=base, in_4bit=in_4bit)
    merge(source, tmp_path / "merged", rows=None, quantize=True)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    keep_layout(lm)
    with torch.no_grad():
        assert torch.allclose(model.module(**EXAMPLE.inputs()).sum(), plain_loss(lm.eval()), rtol=1e-5)
