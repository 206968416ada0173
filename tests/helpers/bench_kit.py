"""Cases and records of a bench, made up: what its lists, tables and pictures are tested with."""

from pathlib import Path
from typing import Any

from plan_kit import SMALL, recipe_text, write

from distft.bench.cases import BenchCase, BenchGrid, grid

TRAIN = "max_steps = 100\nglobal_batch_size = 8\nmicro_batch_size = 1"


def wanted(folder: Path, **asked: Any) -> BenchGrid:
    """A recipe of a small model that is never run."""
    model = write(folder / "model", SMALL)
    (folder / "recipe.toml").write_text(recipe_text(model, train=TRAIN))
    return BenchGrid(recipe=str(folder / "recipe.toml"), **asked)


def cases(folder: Path, **asked: Any) -> list[BenchCase]:
    return grid(wanted(folder, **asked))


def became(
    case: BenchCase,
    *,
    step_s: float = 0.1,
    loss: tuple[float, ...] = (3.0, 2.5, 2.0),
    peak: int = 40 * 2**20,
    **changed: Any,
) -> dict[str, Any]:
    """What the processes of a case might have found."""
    held = {"weights_bytes": 1000, "quant_constants_bytes": 0, "gradients_bytes": 500, "master_bytes": 0,
            "optimizer_bytes": 2000, "pageable_bytes": 0}  # fmt: skip
    rank = {
        "held": held,
        "device": {"allocated_bytes": None, "reserved_bytes": None, "used_bytes": None, "alloc_retries": None},
        "host": {"rss_peak_bytes": 10**9, "data_bytes": 10**9, "own_data_bytes": 3 * 10**8},
        "tensors_bytes": 3000,
        "tensor_growth_bytes": peak - 3000,
    }
    rate = 1000 / step_s
    return {
        "outcome": "measured",
        "reason": "",
        "ran": {
            "engine": case.engine,
            "world": case.world,
            "micro_batch_size": case.micro_batch_size,
            "micros_per_step": 8 // case.world,
            "activation_checkpointing": "off",
            "cross_entropy": "chunked",
            "device": "cpu",
            "device_bytes": None,
            "threads": 1,
            "parameters": 1000,
            "trained_parameters": 1000 if case.method == "full" else 10,
        },
        "speed": {
            "tokens_per_s": rate,
            "block_tokens_per_s": rate,
            "step_s": {"median": step_s, "p10": 0.9 * step_s, "p90": 1.1 * step_s},
            "settled": True,
            "mfu": None,
        },
        "loss": list(loss),
        "left_out": 0,
        "ranks": [rank] * case.world,
    } | changed
