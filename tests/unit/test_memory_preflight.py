"""What runs out of memory is named, with what to change."""

import pytest
import torch

from distft.core.errors import MachineError
from distft.core.phase import PHASE
from distft.memory_preflight import LargestMicroBatch, run_preflight

WORST = LargestMicroBatch(sequences=2, longest=16, micros=4, evaluates=True)


class Objective:
    """Fails in a forward pass with an error of one kind."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def fill(self, micros: list) -> list:
        return micros

    def denominator(self, micros) -> float:
        return float(sum(micro.num_supervised for micro in micros))

    def terms(self, batch):
        raise self.error


class Engine:
    model = None

    def sum_over_ranks(self, *values: float) -> list[float]:
        return list(values)

    def accumulating(self, *, last: bool, seed: int):
        import contextlib

        return contextlib.nullcontext()

    def place(self, batch):
        return batch


def test_the_worst_micro_batch_is_full_and_all_supervised() -> None:
    batch = WORST.batch()
    assert batch.num_tokens == len(batch.input_ids_T) == 32
    assert batch.num_supervised == int((batch.labels_T >= 0).sum()) == 30
    assert batch.cu_seqlens.tolist() == [0, 16, 32]
    assert batch.position_ids_T.tolist() == [*range(16), *range(16)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_says_where_and_what_to_change(error: Exception) -> None:
    PHASE.training()
    with pytest.raises(
        MachineError, match=r"in the forward of a full micro-batch \(2 x 16 tokens\).*\ntry this"
    ) as said:
        run_preflight(WORST, Engine(), Objective(error), advice=lambda: "try this")
    assert said.value.exit_code == 9


def test_other_errors_are_themselves() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_preflight(WORST, Engine(), Objective(RuntimeError("shapes do not match")), advice=lambda: pytest.fail("no"))
