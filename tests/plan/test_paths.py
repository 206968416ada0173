"""Models that need a fall-back are planned as they run: masks and scores of their own attention, logits of their own
head, one document per forward; and scans over tokens, whose traces are read off short ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_folder
from plan_kit import recipe_of
from tiny import CPU, batch

from distft.core.accelerators import named
from distft.core.errors import MachineError
from distft.model import cross_entropy, load
from distft.model.adapters import METHODS
from distft.model.paths import SINGLE, ForwardPath
from distft.plan import inventory, kernels, storages, trace, trace_marks
from distft.plan.case import PlanCase, plan
from distft.plan.setup import Machine
from distft.recipe import ModelTable

OWN_HEAD = ForwardPath(head="own")
EAGER = ForwardPath(attention="eager")
SDPA = ForwardPath(attention="sdpa")
ALONE = ForwardPath(attention=SINGLE, documents="single")
PATHS: dict[str, tuple[str, ForwardPath]] = {
    "llama": ("llama", ForwardPath()),
    "gemma2": ("gemma2", ForwardPath()),
    "gemma2, own head": ("gemma2", OWN_HEAD),
    "gpt-oss": ("gpt_oss", ForwardPath()),
    "deepseek_v3": ("deepseek_v3", ForwardPath()),
    "gptj": ("gptj", EAGER),
    "doge": ("doge", SDPA),
    "qwen2, sdpa": ("qwen2", SDPA),
    "bloom": ("bloom", replace(EAGER, documents="single")),
    "falcon, sdpa": ("falcon", replace(SDPA, documents="single")),
    "lfm2": ("lfm2", ALONE),
    "falcon_h1": ("falcon_h1", ALONE),
    "mamba": ("mamba", ALONE),
    "qwen3_next": ("qwen3_next", ALONE),
}
"""The path that a CPU proves for each; own heads, which few need, and attention that a recipe may ask for."""
SETTINGS: dict[str, dict[str, Any]] = {"falcon": {"alibi": True}}


def folder_of(kind: str, folder: Path, **settings: Any) -> Path:
    return model_folder(kind, folder, **SETTINGS.get(kind, {}), **settings)


def documents(path: ForwardPath, tokens: int) -> list[list[int]]:
    """Three where a mask of blocks is made; else one, as a plan has it."""
    torch.manual_seed(0)
    masked = path.documents == "packed" and path.attention in ("sdpa", "eager")
    lengths = [tokens // 2, tokens // 4, tokens // 4] if masked else [tokens]
    return [torch.randint(3, 60, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("name", PATHS)
def test_peaks_are_those_of_a_real_step_on_the_same_path(tmp_path: Path, name: str) -> None:
    kind, path = PATHS[name]
    tokens = 96
    method = METHODS["full"]
    folder = folder_of(kind, tmp_path / "model")
    table = ModelTable(path=str(folder), dtype="float32", cross_entropy="full")
    built = load.build(table, folder, method, method.params(), seed=1, device=CPU, path=path)
    built.fill(built.module, CPU)
    module: Any = built.module
    module.train()
    rows = batch(documents(path, tokens))
    given = rows.inputs() | {"labels_T": rows.input_ids_T, "num_supervised": tokens}
    held = [*module.parameters(), *module.buffers(), *(v for v in given.values() if isinstance(v, torch.Tensor))]
    with storages.Storages({storages.key_of(tensor) for tensor in held}) as seen, seen.saved():
        with trace_marks.marked(built.rows, seen):
            losses = module(**given)
            (losses[0] if isinstance(losses, tuple) else losses).sum().backward()
        gradients = {seen.serial(param.grad) for param in module.parameters() if param.grad is not None}
    real = seen.summary(gradients, evaluation={"head": 0, "blocks": 0})
    found = inventory.read(table, folder, method, method.params(), path=path)
    kernel, loss = kernels.of_path(path, on_cpu=True), cross_entropy.full_loss
    planned = trace.activations(found, tokens=tokens, checkpointing="off", kernel=kernel, loss=loss)
    got = (planned.saved, planned.saved + planned.head, planned.saved + planned.block)
    assert got == pytest.approx((real.saved, real.head, real.block), rel=0.05), (name, got, real)


# -- scans over tokens ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "loss"), [("off", cross_entropy.chunked_sum), ("full", cross_entropy.full_loss)])
def test_a_scan_is_read_off_short_ones(tmp_path: Path, mode: str, loss: Any) -> None:
    """Every size of the blocks is the traced one to the byte; those of the head to 1 %."""
    tokens = 224
    folder = folder_of("mamba", tmp_path / "model", vocab_size=300_000)  # 111 tokens a chunk
    table = ModelTable(path=str(folder), dtype="bfloat16")
    method = METHODS["full"]
    found = inventory.read(table, folder, method, method.params(), path=ALONE)
    assert trace._loop_step(found, kernels.FLASH, tokens) == 16
    how = (mode, kernels.FLASH, loss)
    read_off = trace.activations(found, tokens=tokens, checkpointing=mode, kernel=kernels.FLASH, loss=loss)
    traced = trace._by_chunks(found, tokens, *how)
    assert (read_off.saved, read_off.kernels) == (traced.saved, traced.kernels)
    for name, value in vars(traced).items():
        assert getattr(read_off, name) == pytest.approx(value, rel=0.01), name
    assert read_off.traffic > 2 * 14**2 / 16 * trace._by_chunks(found, 64, *how).saved, "grows with the square"


@pytest.mark.parametrize("kind", ["llama", "falcon_h1", "gemma2"])
def test_what_does_not_loop_is_traced_as_it_is(tmp_path: Path, kind: str) -> None:
    folder = folder_of(kind, tmp_path / "model")
    found = inventory.read(ModelTable(path=str(folder)), folder, METHODS["full"], METHODS["full"].params())
    assert trace._loop_step(found, kernels.FLASH, 256) is None


# -- what follows from a path -----------------------------------------------------------------------------------------

TWO = Machine(gpu=named("h100-80gb"), gpus_per_node=2)


def planned(folder: Path, path: ForwardPath, *overrides: str, tokens: int | None = None) -> PlanCase:
    recipe = recipe_of(folder, 'engine.name="zero3"', 'train.activation_checkpointing="off"', *overrides)
    method = recipe.method
    found = inventory.read(recipe.model, folder, method.spec, method.params, path=path)
    return plan(recipe, found, TWO, liger=False, document_tokens=tokens)


def test_documents_alone_are_forwards_of_their_own(small: Path) -> None:
    """64 sequences a step on two ranks: 32 forwards of one document, whatever the micro-batch."""
    packed = planned(small, ForwardPath(), "train.micro_batch_size=4")
    alone = planned(small, ALONE, "train.micro_batch_size=4")
    assert (packed.setup.micros_per_step, packed.setup.tokens) == (8, 4 * 4096)
    assert (alone.setup.micros_per_step, alone.setup.tokens) == (32, 4096)
    assert alone.memory.activations.saved == pytest.approx(packed.memory.activations.saved / 4, rel=0.01)
    assert planned(small, ALONE).setup.micro_batch_size == 1, "auto"
    sent = [one.speed.sent.of_step(one.setup.micros_per_step) for one in (alone, packed)]
    assert sent[0] == pytest.approx(4 * sent[1]), "zero3 gathers in each forward"
    row = alone.to_json()
    assert (row["micros_per_step"], row["tokens_per_forward"], row["path"]["documents"]) == (32, 4096, "single")


def test_short_documents_need_more_forwards_and_are_slower(small: Path) -> None:
    full, short = planned(small, ALONE), planned(small, ALONE, tokens=512)
    assert (short.setup.micros_per_step, short.setup.usual_tokens) == (32 * 8, 512)
    assert short.memory.peak == full.memory.peak, "the longest document still comes"
    assert short.speed.tokens_per_s < 0.5 * full.speed.tokens_per_s
    assert short.speed.step_s > 2 * full.speed.step_s
    rows = planned(small, ALONE, "data.packing=false", tokens=512)
    assert (rows.setup.micros_per_step, rows.setup.usual_tokens) == (32, 512)
    assert rows.speed.tokens_per_s == pytest.approx(32 * 512 * 2 / rows.speed.step_s)
    assert planned(small, ForwardPath(), tokens=512).to_json() == planned(small, ForwardPath()).to_json(), "packed"


def test_own_logits_stand_at_once(small: Path) -> None:
    """515 logits of 4,096 tokens in bf16 and in fp32, and the gradients of both."""
    chunked, own = planned(small, ForwardPath()), planned(small, OWN_HEAD)
    logits = own.setup.tokens * 515
    assert own.memory.activations.head >= (4 + 4 + 2) * logits
    assert own.setup.loss == own.to_json()["cross_entropy"] == "own"
    assert chunked.setup.loss == "chunked"


def test_masks_and_scores_stand_in_square(small: Path) -> None:
    """4,096 tokens: a mask in bf16 for all layers, or scores of four heads for each."""
    one = ("train.micro_batch_size=1",)
    fast, sdpa, eager = (planned(small, path, *one).memory.activations for path in (ForwardPath(), SDPA, EAGER))
    square = 4096**2
    assert sdpa.saved - fast.saved > square
    assert eager.saved_per_block - fast.saved_per_block == pytest.approx(4 * square * (2 + 4), rel=0.01)
    alone = planned(small, replace(SDPA, documents="single"), *one).memory.activations
    assert alone.saved < fast.saved + square, "one causal document needs no mask"


def test_values_of_another_head_size_sinks_caps_and_router_losses_are_planned_for_a_gpu(tmp_path: Path) -> None:
    for kind in ("deepseek_v3", "gpt_oss", "gemma2", "mixtral"):
        folder = folder_of(kind, tmp_path / kind, **({"output_router_logits": True} if kind == "mixtral" else {}))
        assert planned(folder, ForwardPath(), "data.max_length=128").memory.activations.saved > 0


def test_a_forward_that_looks_at_values_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = folder_of("jetmoe", tmp_path / "model")
    with pytest.raises(MachineError, match=r"JetMoeForCausalLM cannot be planned.*set \[train\] micro_batch_size"):
        planned(folder, SDPA, "data.max_length=128")


def test_an_attention_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="paged"):
        kernels.of_path(ForwardPath(attention="paged|eager"))
    for attend in (kernels.flash_attention, kernels.cpu_attention):
        q, k, v = (torch.empty(1, 2, 8, 16, device="meta") for _ in range(3))
        with pytest.raises(ValueError, match="position_bias"):
            attend(torch.nn.Identity(), q, k, v, None, position_bias=torch.empty(1))
        with pytest.raises(ValueError, match="attention_mask"):
            attend(torch.nn.Identity(), q, k, v, torch.empty(1, 1, 8, 8))
