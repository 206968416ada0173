"""What is lost when the gradients of a step's micro-batches are added in bf16, and in fp32.

    python benchmarks/gradient_sums.py [--elements N] [--out FILE.md]

Each micro-batch's gradient is a bf16 number: a part that all micro-batches share and a part of its own, in three
mixtures from independent gradients to nearly equal ones. Their sum in bf16 and in fp32 is compared with the sum in fp64
of the same numbers before they were rounded to bf16. "size" is the length of the sum along the exact one: below 1 it is
too small in every step, whatever the optimizer averages. Seeded; the same numbers on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

MICROS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARED = {"independent": 0.0, "noisy": 0.3, "coherent": 3.0}
"""Size of the shared part of a gradient beside its own part of size 1."""


def errors(shared: float, elements: int) -> dict[int, tuple[float, float, float]]:
    """Micro-batches -> (relative error of the bf16 sum, its size, relative error of the fp32 sum)."""
    generator = torch.Generator().manual_seed(0)
    common = shared * torch.randn(elements, generator=generator)
    half = torch.zeros(elements, dtype=torch.bfloat16)
    single = torch.zeros(elements)
    exact = torch.zeros(elements, dtype=torch.float64)
    found = {}
    for micro in range(1, MICROS[-1] + 1):
        gradient = 1e-3 * (common + torch.randn(elements, generator=generator))
        half += gradient.bfloat16()
        single += gradient.bfloat16()
        exact += gradient.double()
        if micro in MICROS:
            norm = exact.norm()
            found[micro] = (
                ((half.double() - exact).norm() / norm).item(),
                (half.double().dot(exact) / norm**2).item(),
                ((single.double() - exact).norm() / norm).item(),
            )
    return found


def table(elements: int) -> str:
    """Markdown: a line for each number of micro-batches."""
    columns = {name: errors(shared, elements) for name, shared in SHARED.items()}
    lines = ["| micro-batches | " + " | ".join(f"bf16, {name} | size" for name in columns) + " | fp32 |"]
    lines.append("|---:" * (2 * len(columns) + 2) + "|")
    for micros in MICROS:
        cells = [f"{100 * found[micros][0]:.2f} % | {found[micros][1]:.3f}" for found in columns.values()]
        fp32 = [100 * found[micros][2] for found in columns.values()]
        lines.append(f"| {micros:,} | " + " | ".join(cells) + f" | {min(fp32):.2f} to {max(fp32):.2f} % |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=200_000, help="of the gradient")
    parser.add_argument("--out", type=Path, help="a file to write the table to as well")
    options = parser.parse_args(argv)
    text = table(options.elements)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
