"""The written budget of what a rank sends for an 8B model on eight GPUs.

tests/dist/test_collectives.py counts the same figures of the planner's on the real libraries, for a small model.
"""

from pathlib import Path

import pytest
from plan_kit import read, recipe_of

from distft.core.accelerators import named
from distft.plan.case import plan
from distft.plan.setup import Machine

EIGHT = Machine(gpu=named("h100-80gb"), gpus_per_node=8)
MATRICES = 6_979_321_856
"""Weights of the blocks' matrices."""
NORMS = 32 * 2 * 4096
ENDS = 2 * 128_256 * 4096 + 4096
ADAPTERS = 41_943_040
"""Rank 16 on every matrix."""
OTHERS = 7 / 8
BUDGET_GB = {
    # a step of one micro-batch, and of four, a rank: GB
    ("ddp", "full"): (56.21, 56.21),
    ("zero1", "full"): (42.16, 42.16),
    ("zero2", "full"): (42.16, 126.48),
    ("zero3", "full"): (56.21, 224.85),
    ("fsdp2", "full"): (54.37, 217.49),
    ("ddp", "lora"): (0.294, 0.294),
    ("zero1", "lora"): (0.220, 0.220),
    ("zero2", "lora"): (0.220, 0.661),
    ("zero3", "lora"): (28.40, 113.60),
    ("fsdp2", "lora"): (26.56, 106.25),
    ("ddp", "qlora"): (0.294, 0.294),
    ("zero1", "qlora"): (0.220, 0.220),
    ("zero2", "qlora"): (0.220, 0.661),
    ("zero3", "qlora"): (10.08, 40.32),
    ("fsdp2", "qlora"): (8.24, 32.97),
}


def by_hand(engine: str, method: str, micros: int) -> float:
    """From the sizes of the model: bf16 weights, gradients reduced in fp32, codes of half a byte."""
    trained = MATRICES + NORMS + ENDS if method == "full" else ADAPTERS
    stored = (0.5 if method == "qlora" else 2) * MATRICES + 2 * (NORMS + ENDS)
    stored += 0 if method == "full" else 2 * ADAPTERS
    match engine:
        case "ddp":
            return OTHERS * 2 * 4 * trained
        case "zero1":
            return OTHERS * (4 + 2) * trained
        case "zero2":
            return OTHERS * (micros * 4 + 2) * trained
        case "zero3":
            return OTHERS * micros * (2 * stored + 4 * trained)
        case _:
            return OTHERS * micros * (2 * stored - 2 * ENDS + 4 * trained)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_an_8b_model_sends_what_its_budget_says(llama8b: Path, method: str) -> None:
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        for micros, budget in zip((1, 4), BUDGET_GB[engine, method], strict=True):
            recipe = recipe_of(
                llama8b,
                f'engine.name="{engine}"',
                f'method.name="{method}"',
                "train.micro_batch_size=1",
                f"train.global_batch_size={8 * micros}",
                'train.activation_checkpointing="off"',
            )
            sent = plan(recipe, read(recipe), EIGHT).speed.sent.of_step(micros)
            assert sent == pytest.approx(by_hand(engine, method, micros), rel=1e-3), (engine, micros)
            assert sent / 1e9 <= budget * 1.002, (engine, micros)
            assert sent / 1e9 >= budget * 0.99, ("a smaller budget can be written", engine, micros)
