"""Traced on the meta device = saved by autograd in a real forward, byte for byte; and what must follow from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plan_kit import CRITIC, LLAMA_8B, SMALL, note_row, read, recipe_of, write
from tiny import batch, build

from distft.model import activation_checkpointing, cross_entropy
from distft.plan import kernels, storages, trace, trace_marks
from distft.plan.trace import Activations

QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 96, "intermediate_size": 130,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 301,
    "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 130,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301,
    "sliding_window": 4096, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {"llama": SMALL, "qwen2": QWEN, "mistral": MISTRAL}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"r": 8, "dropout": 0.1}, "qlora": {"r": 8}}


def really_saved(folder: Path, method: str, mode: str, dtype: str, tokens: int) -> int:
    """Bytes of the storages that autograd's hooks see in a forward on the CPU, parameters and inputs left out."""
    built = build(folder, method, dtype=dtype, attention="varlen", cross_entropy="full", params=METHODS[method])
    activation_checkpointing.checkpoint_blocks(built.module.transformer, mode)  # type: ignore[arg-type]
    built.module.train()
    rows = batch([torch.randint(3, 200, (tokens,)).tolist()])
    given = rows.inputs() | {"labels_T": rows.input_ids_T, "num_supervised": tokens}
    inputs = [value for value in given.values() if isinstance(value, torch.Tensor)]
    own = {t.untyped_storage().data_ptr() for t in [*built.module.parameters(), *built.module.buffers(), *inputs]}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # alive, so that no address is used twice
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        built.module(**given)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_saved_bytes_are_those_of_a_real_forward(
    tmp_path: Path, model: str, method: str, mode: str, dtype: str
) -> None:
    folder = write(tmp_path / model, MODELS[model])
    overrides = [f"method.{key}={value}" for key, value in METHODS[method].items()]
    recipe = recipe_of(folder, f'model.dtype="{dtype}"', f'method.name="{method}"', *overrides)
    planned = trace.activations(
        read(recipe), tokens=128, checkpointing=mode, kernel=kernels.CPU, loss=cross_entropy.full_loss
    )
    real = really_saved(folder, method, mode, dtype, 128)
    note_row(model, method, dtype, mode, "saved", planned.saved_tensors, real)
    assert planned.saved_tensors == real


def flash(recipe: Any, tokens: int, mode: str = "off", loss: Any = cross_entropy.chunked_sum) -> Activations:
    return trace.activations(read(recipe), tokens=tokens, checkpointing=mode, kernel=kernels.FLASH, loss=loss)


def test_checkpointing_keeps_a_blocks_input_and_nothing_else(llama8b: Path) -> None:
    full = flash(recipe_of(llama8b), 4096, "full")
    assert full.saved_per_block == 2 * 4096 * LLAMA_8B["hidden_size"]


def test_selective_lies_between_off_and_full(llama8b: Path) -> None:
    off, half, full = (flash(recipe_of(llama8b), 2048, mode).saved for mode in ("off", "selective", "full"))
    assert full < half < 0.6 * off


def test_what_recomputation_repeats_is_alive_once(llama8b: Path) -> None:
    """Under checkpointing one block's activations exist while it runs; without it nothing new."""
    off, full = flash(recipe_of(llama8b), 2048), flash(recipe_of(llama8b), 2048, "full")
    assert 0.8 * off.saved_per_block < full.block < 1.6 * off.saved_per_block


def test_logits_in_chunks_do_not_grow_with_the_tokens(llama8b: Path) -> None:
    short, long = flash(recipe_of(llama8b), 4096), flash(recipe_of(llama8b), 16384)
    hidden = 2 * (16384 - 4096) * LLAMA_8B["hidden_size"]
    assert long.head - short.head < 4 * hidden
    plain = flash(recipe_of(llama8b), 4096, loss=cross_entropy.full_loss)
    assert plain.head > 8 * 4096 * LLAMA_8B["vocab_size"]


@pytest.mark.parametrize("loss", [cross_entropy.chunked_loss, cross_entropy.chunked_sum])
def test_many_chunks_are_read_off_a_line_through_few(tmp_path: Path, loss: Any) -> None:
    """Long micro-batches are not traced chunk by chunk: the line must hit what tracing gives."""
    folder = write(tmp_path / "wide", SMALL | {"vocab_size": 400_000})  # 83 tokens a chunk
    found = read(recipe_of(folder))
    chunk = cross_entropy.chunk_tokens(400_000)
    tokens = 11 * chunk
    drawn = trace.activations(found, tokens=tokens, checkpointing="off", kernel=kernels.FLASH, loss=loss)
    traced = trace._traced(found, tokens, "off", kernels.FLASH, loss)
    for name, value in vars(traced).items():
        assert getattr(drawn, name) == pytest.approx(value, rel=0.01), name
    assert max(drawn.peaks) == drawn.saved + drawn.block


def test_a_trace_leaves_the_model_as_it_was(small: Path) -> None:
    found = read(recipe_of(small))
    first = trace._traced(found, 64, "full", kernels.FLASH, cross_entropy.full_loss)
    trace._traced.cache_clear()
    trace._traced(found, 64, "selective", kernels.CPU, cross_entropy.chunked_sum)
    assert trace._traced(found, 64, "full", kernels.FLASH, cross_entropy.full_loss) == first
    assert all(param.grad is None for sample in found.samples for param in sample.module.parameters())


PEAKS = [
    pytest.param(
        method, mode, critic, id=f"{method}-{mode}-{'critic' if critic else 'alone'}",
        marks=[pytest.mark.slow] if critic and (method, mode) != ("lora", "full") else [],
    )
    for method in ("full", "lora") for mode in ("off", "selective", "full") for critic in ((), CRITIC)
]  # fmt: skip


@pytest.mark.parametrize(("method", "mode", "critic"), PEAKS)
def test_peaks_are_those_of_a_real_step(small: Path, method: str, mode: str, critic: tuple[str, ...]) -> None:
    """The same bookkeeping around a real forward and backward of all five blocks, or of two such rows, on the CPU."""
    tokens = 256
    more = {"head": "lm_critic"} if critic else {}
    built = build(
        small, method, attention="varlen", cross_entropy="full", params=METHODS[method] | NO_DROPOUT[method], **more
    )
    module: Any = built.module
    for model in module.pretrained:
        activation_checkpointing.checkpoint_blocks(model, mode)  # type: ignore[arg-type]
    module.train()
    rows = batch([torch.randint(3, 200, (tokens,)).tolist()])
    given = rows.inputs() | {"labels_T": rows.input_ids_T, "num_supervised": tokens}
    given |= {"per_token": True, "values": True} if critic else {}
    held = [*module.parameters(), *module.buffers(), *(v for v in given.values() if isinstance(v, torch.Tensor))]
    uncounted = {storages.key_of(tensor) for tensor in held}
    with storages.Storages(uncounted, trace_marks.phases(built.rows)) as seen, seen.saved():
        with trace_marks.marked(built.rows, seen):
            module(**given).sum().backward()
        gradients = {seen.serial(param.grad) for param in module.parameters() if param.grad is not None}
    real = seen.summary(gradients, evaluation={"head": 0, "blocks": 0})
    overrides = [f"method.{key}={value}" for key, value in (METHODS[method] | NO_DROPOUT[method]).items()]
    recipe = recipe_of(small, 'model.dtype="float32"', f'method.name="{method}"', *overrides, *critic)
    planned = trace.activations(
        read(recipe), tokens=tokens, checkpointing=mode, kernel=kernels.CPU, loss=cross_entropy.full_loss
    )
    note_row("llama", method, "float32", mode, "peak, head", planned.saved + planned.head, real.head)
    note_row("llama", method, "float32", mode, "peak, blocks", planned.saved + planned.block, real.block)
    assert planned.saved == pytest.approx(real.saved, rel=1e-3)
    assert planned.saved + planned.head == pytest.approx(real.head, rel=0.02)
    assert planned.saved + planned.block == pytest.approx(max(real.saved, real.block), rel=0.02)
    assert planned.peaks == pytest.approx(real.peaks, rel=0.02, abs=4096)
    assert planned.between == pytest.approx(real.between, rel=0.02)
    assert bool(real.between) == bool(critic)


NO_DROPOUT: dict[str, dict[str, Any]] = {"full": {}, "lora": {"dropout": 0.0}}
