"""Merged folders: tensors are the dense formula's, predictions are the adapter's, a folder is whole or not there."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_kit import make_adapter, make_base, oracle, rows, tensors
from peft import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distft.core.errors import FileSystemError, NumericError, RecipeError
from distft.merging import merging, model_writer
from distft.merging.base_model import BaseModel, TrainedIn4bit
from distft.merging.merging import MergeSource, merge
from distft.model.quant_params import QuantParams

TARGETS = ["q_proj", "down_proj"]
PLAIN = LoraConfig(r=2, target_modules=TARGETS)
DENSE: dict[str, tuple[str, Any, dict]] = {
    "plain llama": ("llama", PLAIN, {}),
    "plain tied qwen": ("qwen", PLAIN, {"tie_word_embeddings": True}),
    "plain gemma (tied)": ("gemma", PLAIN, {}),
    "plain untied gemma3": ("gemma3", PLAIN, {"tie_word_embeddings": False}),
    "rslora with patterns": (
        "qwen",
        LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, lora_alpha=6, rank_pattern={"down_proj": 2},
                   alpha_pattern={"layers.1.self_attn.q_proj": 3}),
        {},
    ),
    "dora llama": ("llama", LoraConfig(r=2, target_modules=TARGETS, use_dora=True), {}),
    "dora gemma3": ("gemma3", LoraConfig(r=2, target_modules=TARGETS, use_dora=True), {}),
    "dora on transposed weights": (
        "gpt2", LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True), {},
    ),
    "bias of B": ("llama", LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), {"attention_bias": True}),
    "all biases": ("qwen", LoraConfig(r=2, target_modules=["q_proj"], bias="all"), {}),
    "biases of adapted layers": ("qwen", LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"), {}),
    "modules_to_save": ("llama", replace(PLAIN, modules_to_save=["lm_head", "model.norm"]), {}),
}  # fmt: skip
"""The oracle knows these; the others are compared by what they predict."""
PREDICTED: dict[str, tuple[str, Any, dict]] = {
    "embedding": ("llama", LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"]), {}),
    "embedding under DoRA": ("llama", LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"], use_dora=True), {}),
    "rows of tokens": ("llama", LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 5]), {}),
    "rows of tokens, tied": (
        "llama", LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 5]), {"tie_word_embeddings": True},
    ),
    "rows of tokens alone": ("gemma", TrainableTokensConfig(token_indices=[3, 5]), {}),
    "IA3": ("qwen", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), {}),
    "IA3 on transposed weights": (
        "gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                          fan_in_fan_out=True), {},
    ),
    "experts and a router": (
        "moe", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[
            "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]), {},
    ),
}  # fmt: skip
UNTIES: dict[str, tuple[str, Any, dict, bool]] = {
    "head saved whole": ("qwen", replace(PLAIN, modules_to_save=["lm_head"]), {}, True),
    "embedding saved whole": ("gemma", replace(PLAIN, modules_to_save=["embed_tokens"]), {}, True),
    "embedding saved for both": (
        "gemma", replace(PLAIN, modules_to_save=["embed_tokens"], ensure_weight_tying=True), {}, False,
    ),
    "low rank on the embedding": ("gemma3", LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"]), {}, True),
    "low rank on both": (
        "llama", LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"], ensure_weight_tying=True), {}, False,
    ),
    "low rank on the head": ("llama", LoraConfig(r=2, target_modules=[*TARGETS, "lm_head"]), {}, True),
}  # fmt: skip


def made(tmp_path: Path, kind: str, config: Any, more: dict) -> MergeSource:
    base = make_base(tmp_path / "base", kind, **more)
    return MergeSource(adapter=make_adapter(tmp_path / "adapter", base, config), base=base)


@pytest.mark.parametrize("case", DENSE)
def test_every_tensor_is_the_dense_formulas(case: str, tmp_path: Path) -> None:
    kind, config, more = DENSE[case]
    source = made(tmp_path, kind, config, more)
    report = merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32, max_file_bytes=6000)
    ours, wanted = tensors(tmp_path / "merged"), oracle(source.base, source.adapter)
    assert ours.keys() == wanted.keys()
    worst = max(float((ours[name].double() - wanted[name]).abs().max()) for name in wanted)
    assert worst <= 1e-6
    moved = [name for name, tensor in tensors(source.base).items() if not torch.equal(tensor, ours[name])]
    assert moved
    assert sum(report.formulas.values()) == len(moved), "what the report counts is what has moved"
    assert report.comparison is not None
    assert report.comparison.kl < 1e-7
    assert report.comparison.agreement == 1.0
    # PEFT's own merge is right for these, and a third opinion.
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source.base), str(source.adapter))
    theirs = peft.merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert loaded.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(loaded[name], theirs[name], atol=1e-5, rtol=1e-5)
    # The hub's layout: an index over several files, the tokenizer and the config beside them.
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in ours.values())
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (source.base / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "merged/merge.json").read_text())["formulas"] == report.formulas
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("case", PREDICTED)
def test_other_kinds_predict_what_peft_predicts(case: str, tmp_path: Path) -> None:
    kind, config, more = PREDICTED[case]
    source = made(tmp_path, kind, config, more)
    report = merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32)
    assert report.comparison is not None
    assert report.comparison.largest_kl < 2e-6
    assert report.comparison.agreement == 1.0
    assert not report.untied
    changed = {name for name, tensor in tensors(source.base).items() if not torch.equal(tensor, tensors(tmp_path / "merged")[name])}  # fmt: skip  # noqa: E501
    assert changed, "an adapter that changes nothing would predict the same as well"


@pytest.mark.parametrize("case", UNTIES)
def test_a_head_that_is_no_longer_the_embedding_is_untied(case: str, tmp_path: Path) -> None:
    kind, config, more, unties = UNTIES[case]
    source = made(tmp_path, kind, config, {"tie_word_embeddings": True} | more)
    report = merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32)
    assert report.untied is unties
    assert ("lm_head.weight" in tensors(tmp_path / "merged")) is unties, "tied weights are stored once"
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is not unties
    assert report.comparison is not None
    assert report.comparison.largest_kl < 2e-6


def test_types(tmp_path: Path) -> None:
    source = made(tmp_path, "llama", PLAIN, {})
    exact = merge(source, tmp_path / "fp32", rows=rows(), dtype=torch.float32)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        report = merge(source, tmp_path / name, rows=rows(), dtype=dtype)
        assert {tensor.dtype for tensor in tensors(tmp_path / name).values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert report.comparison is not None
        assert exact.comparison is not None
        assert exact.comparison.kl < report.comparison.kl < report.max_kl
        rounded = {key: tensor.to(dtype) for key, tensor in tensors(tmp_path / "fp32").items()}
        assert all(torch.equal(rounded[key], tensor) for key, tensor in tensors(tmp_path / name).items())


def test_a_merged_model_that_is_another_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path, "llama", PLAIN, {})
    with pytest.raises(
        NumericError, match=r"KL\(adapter \|\| merged\) = .* allowed 1e-12.*no folder was left"
    ) as refused:
        merge(source, tmp_path / "merged", rows=rows(), dtype=torch.bfloat16, max_kl=1e-12)
    assert refused.value.exit_code == 5
    # A planted wrong scale: rank-stabilised adapters merged by the plain rule, as converters have done.
    monkeypatch.setattr("distft.merging.adapter_config.AdapterConfig.scale_of", lambda self, module: 1.0)
    with pytest.raises(NumericError, match="is not the adapter's"):
        merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path, "llama", PLAIN, {})
    written = []

    def full(path: Path, plans: Any, values: Any) -> str:
        digest = own(path, plans, values)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return digest

    own = model_writer.folder_writer.write_tensor_file
    monkeypatch.setattr(model_writer.folder_writer, "write_tensor_file", full)
    with pytest.raises(FileSystemError, match=r"cannot be written: No space left on device; nothing was left there"):
        merge(source, tmp_path / "merged", rows=None, dtype=torch.float32, max_file_bytes=6000)
    assert len(written) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(FileSystemError, match=r"needs 0\.00 GiB, and the disk has 0\.00"):
        merge(source, tmp_path / "merged", rows=None, dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_stale_folder_of_a_killed_merge_is_no_hindrance(tmp_path: Path) -> None:
    source = made(tmp_path, "llama", PLAIN, {})
    (tmp_path / ".tmp-merged").mkdir()
    (tmp_path / ".tmp-merged/model-00007-of-00009.safetensors").write_text("half")
    merge(source, tmp_path / "merged", rows=None, dtype=torch.float32)
    assert not list((tmp_path / "merged").glob("*00007*"))
    report = json.loads((tmp_path / "merged/merge.json").read_text())
    written = (tmp_path / "merged/model.safetensors").read_bytes()
    assert report["files_sha256"] == {"model.safetensors": hashlib.sha256(written).hexdigest()}
    again = merge(source, tmp_path / "again", rows=None, dtype=torch.float32)
    assert again.files_sha256 == report["files_sha256"], "the same bytes each time"
    assert not (tmp_path / ".tmp-merged").exists()


def test_a_base_that_was_trained_on_in_4_bits(tmp_path: Path) -> None:
    """Default: into the values that the run computed with. --quantize: stored in 4 bits again, with what that costs."""
    source = made(tmp_path, "llama", PLAIN, {"hidden_size": 64, "intermediate_size": 172})
    how = TrainedIn4bit(params=QuantParams(), dtype=torch.float32)
    source = MergeSource(adapter=source.adapter, base=source.base, in_4bit=how)
    report = merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32)
    assert report.base_in_4bit == 2 * 7
    assert report.comparison is not None
    assert report.comparison.kl < 1e-7
    # An independent quantiser: bitsandbytes called by hand.
    from bitsandbytes import functional

    name = "model.layers.0.self_attn.k_proj.weight"  # not adapted: the merged value is the base's, as trained
    whole = tensors(source.base)[name]
    packed, state = functional.quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
    seen = functional.dequantize_4bit(packed, state)
    assert torch.equal(tensors(tmp_path / "merged")[name], seen)
    assert not torch.equal(seen, whole)
    assert torch.equal(tensors(tmp_path / "merged")["model.embed_tokens.weight"], tensors(source.base)["model.embed_tokens.weight"])  # fmt: skip  # noqa: E501

    packed_report = merge(source, tmp_path / "packed", rows=rows(), dtype=torch.float32, quantize=True, max_kl=1.0)
    assert len(packed_report.quantized) == 14
    errors = {error.name: error for error in packed_report.quantized}
    adapted = errors["model.layers.0.self_attn.q_proj.weight"]
    assert 0.01 < adapted.relative_error < 0.2, "4 bits round by several percent"
    assert errors[name].relative_error < 1e-2, "what is not adapted was in 4 bits already"
    assert math.isnan(errors[name].share_of_change), "nothing has changed it"
    assert packed_report.comparison is not None
    assert packed_report.comparison.kl > report.comparison.kl
    size = (tmp_path / "packed/model.safetensors").stat().st_size
    assert size < 0.6 * (tmp_path / "merged/model.safetensors").stat().st_size


def test_a_reward_model(tmp_path: Path) -> None:
    """Its head is in no file of the base: it comes from the adapter, and rewards are compared instead of tokens."""
    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    lm = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=None)
    model = get_peft_model(lm, replace(PLAIN, task_type="SEQ_CLS", modules_to_save=["score"]))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3 * torch.randn_like(param))
    model.save_pretrained(tmp_path / "adapter")
    source = MergeSource(adapter=tmp_path / "adapter", base=base)
    report = merge(source, tmp_path / "merged", rows=rows(), dtype=torch.float32)
    assert report.comparison is not None
    assert report.comparison.kl < 1e-9
    assert (report.comparison.num_rows, report.comparison.num_tokens) == (4, 3)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert loaded.config.pad_token_id is None, "no row is read one token early"
    for row in rows():
        ids = torch.tensor([row])
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5, rtol=0
            )
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "w63"}))
    merge(source, tmp_path / "padded", rows=None, dtype=torch.float32)
    assert json.loads((tmp_path / "padded/config.json").read_text())["pad_token_id"] == 63
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    save_file({key: t for key, t in held.items() if "score" not in key}, tmp_path / "adapter/adapter_model.safetensors")
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(raw | {"modules_to_save": ["classifier", "score"]})
    )
    with pytest.raises(RecipeError, match=r"holds no score\.weight, and neither does the base"):
        merge(source, tmp_path / "headless", rows=None, dtype=torch.float32)


def test_names_and_values_of_a_base(tmp_path: Path) -> None:
    base = BaseModel(make_base(tmp_path / "base", "moe"))
    assert base.shape("model.layers.0.mlp.experts.down_proj") == (4, 16, 8)
    assert base.kinds["model.layers.0.mlp.experts"] == "other"
    stored = tensors(tmp_path / "base")
    third = stored["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert torch.equal(base.value("model.layers.0.mlp.experts.down_proj")[2], third)
    assert merging.DTYPES["bfloat16"] is torch.bfloat16
