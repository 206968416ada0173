"""What gradients of a bf16 model are summed in: where fp32 is needed, and what bf16 costs."""

from __future__ import annotations

from typing import Literal

GradDtype = Literal["auto", "float32", "bfloat16"]
"""What gradients of a bf16 model are summed in."""

MANY_MICROS = 32
"""Micro-batches of a step up to which bf16 sums err by less than 1 % (benchmarks/gradient_sums.py)."""


def keeps_fp32_gradients(grad_dtype: GradDtype, *, half: bool, micros_per_step: int) -> bool:
    """Return whether the gradients of a step are kept in fp32 until its update.

    Args:
        grad_dtype: of the recipe.
        half: the model computes in bf16; gradients of an fp32 model are fp32 whatever the recipe says.
        micros_per_step: under "auto", a single micro-batch leaves nothing to add up.
    """
    return half and (grad_dtype == "float32" or (grad_dtype == "auto" and micros_per_step > 1))


BF16_ERRORS: tuple[tuple[int, str], ...] = (
    (8, "0.3 to 0.4 %"),
    (16, "0.4 to 0.5 %"),
    (32, "0.6 to 0.7 %"),
    (64, "0.8 to 1.0 %"),
    (128, "1.1 to 1.6 %"),
    (256, "1.6 to 5 %"),
    (512, "2 to 19 %"),
    (1024, "4 to 52 %"),
)
"""(micro-batches, relative error of their bf16 sum): least and most of three mixtures, from independent gradients to
nearly equal ones (benchmarks/gradient_sums.py)."""


def error_of_bf16_sums(micros_per_step: int) -> str:
    """Return the range of the relative error of a step's gradient, as text."""
    return next((text for count, text in BF16_ERRORS if micros_per_step <= count), "4 % to more than 50 %")
