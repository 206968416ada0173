"""The real job on one GPU: every method learns, every engine agrees with solo, and memory savers save memory."""

import gc
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from harness import Bench, Run, relative
from tiny import batch as made
from tiny import build, documents

from distft.metrics.throughput import peak_flops
from distft.model import activation_checkpointing

pytestmark = pytest.mark.gpu

METHODS = {
    "full": [],
    "lora": ['method.name="lora"', "method.r=4", "optim.learning_rate=3e-3"],
    "qlora": ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3", 'optim.name="paged_adamw_8bit"'],
}
NEEDS = {"full": None, "lora": "peft", "qlora": "bitsandbytes", "solo": None, "fsdp2": None, "zero3": "deepspeed"}
HERE = [name for name, package in NEEDS.items() if package is None or importlib.util.find_spec(package)]


def needed(name: str) -> None:
    if name not in HERE:
        pytest.skip(f"{name} needs {NEEDS[name]}")


@pytest.fixture(scope="module")
def methods(bench: Bench) -> dict[str, Run]:
    common = ['model.dtype="bfloat16"', 'engine.name="solo"', "train.max_steps=5"]
    cases = {name: [*common, *own] for name, own in METHODS.items() if name in HERE}
    return bench.launch(1, cases, tag="gpu-methods")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_in_bf16(method: str, methods: dict[str, Run]) -> None:
    needed(method)
    run = methods[method]
    losses = run.column("loss")
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.1
    assert run.evals[-1]["eval_loss"] < run.evals[0]["eval_loss"]
    assert all(0 < memory < 8 for memory in run.column("memory_gib"))
    facts = json.loads((run.folder / "manifest.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name(0)
    for step in run.steps:
        assert (step["mfu"] is None) == (peak_flops(facts["device"]) is None)
        assert step["mfu"] is None or 0 < step["mfu"] < 1
    assert (run.folder / "final").is_dir()


@pytest.fixture(scope="module")
def engines(bench: Bench) -> dict[str, Run]:
    cases = {name: [f'engine.name="{name}"'] for name in ("solo", "fsdp2", "zero3") if name in HERE}
    return bench.launch(1, cases, tag="gpu-engines")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_engines_of_one_process_agree_with_solo_in_fp32(engine: str, engines: dict[str, Run]) -> None:
    needed(engine)
    for column in ("loss", "grad_norm"):
        assert relative(engines[engine].column(column), engines["solo"].column(column)) < 1e-4, column


def test_one_gpu_agrees_with_the_cpu(engines: dict[str, Run], bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe with the GPU hidden: what CI tests is what a cluster runs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = bench.launch(1, {"solo": ['engine.name="solo"']}, tag="cpu-engines")["solo"]
    for column in ("loss", "grad_norm"):
        assert relative(engines["solo"].column(column), on_cpu.column(column)) < 1e-3, column


def test_activation_checkpointing_lowers_the_peak_and_keeps_the_loss(device: torch.device, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    micro = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made(documents([8192])).inputs().items()}
    peaks, losses, norms = {}, {}, {}
    for mode in ("off", "selective", "full"):
        model = build(tmp_path, device=device, dtype="bfloat16").module.train()
        activation_checkpointing.checkpoint_blocks(model.transformer, mode)  # type: ignore[arg-type]
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(**micro).sum()
        loss.backward()
        peaks[mode] = torch.cuda.max_memory_allocated() - before
        losses[mode] = loss.item()
        norms[mode] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        del model, loss
    assert peaks["full"] < peaks["selective"] < peaks["off"], peaks
    assert peaks["full"] < 0.6 * peaks["off"], peaks
    for values in (losses, norms):
        assert list(values.values()) == pytest.approx([values["off"]] * 3, rel=1e-2)
