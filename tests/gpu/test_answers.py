"""Answers from a GPU: those of a CPU in fp32, the same in any batch; and what happens where memory really runs out."""

import json
from pathlib import Path

import pytest
import torch
from generating import opened
from tiny import documents

from distft.generation.completion import Prompt, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [Prompt(seed_key=str(at), ids=ids) for at, ids in enumerate(documents([9, 30, 4, 17, 1, 22, 60, 3], seed=5))]
HOW = SamplingParams(max_new_tokens=40)


@pytest.mark.parametrize(
    "how", [HOW, SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.9)], ids=["greedy", "drawn"]
)
def test_in_fp32_they_are_those_of_a_cpu_in_any_batch(
    device: torch.device, tiny_config: Path, how: SamplingParams
) -> None:
    """Draws come from the row's name, not from the device's generator."""
    (_, here), (_, there) = opened(tiny_config, device=device), opened(tiny_config)
    said = here.generate(PROMPTS, how)
    assert said == there.generate(PROMPTS, how)
    for rows in (1, 3):
        few = SamplingParams(**{**vars(how), "batch_size": rows})
        assert here.generate(PROMPTS, few) == said


@pytest.mark.parametrize("method", ["full", "lora"])
def test_in_bf16_every_row_is_answered_and_likelihoods_are_near(
    device: torch.device, tiny_config: Path, method: str
) -> None:
    """Batches are multiplied in other orders, so tokens may differ; likelihoods by what 8 bits of mantissa allow."""
    (_, half), (_, whole) = (
        opened(tiny_config, method, device=device, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    said = half.generate(PROMPTS, HOW)
    assert all(0 < one.num_tokens <= 40 for one in said)
    pairs = [(prompt.ids, [5, 9]) for prompt in PROMPTS]
    for (near, _), (right, _) in zip(half.loglikelihood(pairs), whole.loglikelihood(pairs), strict=True):
        assert near == pytest.approx(right, abs=0.15)


def test_where_memory_runs_out_less_is_answered_at_once(
    device: torch.device, tiny_config: Path, tmp_path: Path
) -> None:
    """A limit on what torch may take, below what 64 rows need and above what 8 do."""
    config = json.loads((tiny_config / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    _, own = opened(tmp_path, device=device)
    rows = [Prompt(seed_key=str(at), ids=ids) for at, ids in enumerate(documents([2000] * 16, seed=2))]
    how = SamplingParams(max_new_tokens=4, batch_size=16)
    torch.cuda.reset_peak_memory_stats()
    whole = own.generate(rows, how)
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    limit = held + (peak - held) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        assert own.generate(rows, how) == whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert own.share < 1
