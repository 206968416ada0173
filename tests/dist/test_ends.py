"""A run that fails says why before anything that may block, on one process and on one of two."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
from forks import shared
from harness import ROOT, Bench

from distft import assemble, load_recipe, train
from distft.core.errors import MachineError
from distft.core.out_of_memory import is_out_of_memory
from distft.engine import processes
from distft.engine.solo import SoloEngine

FULL_CARD = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error. Cuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL_CARD, ids=lambda error: type(error).__name__)
def test_every_form_of_a_full_card_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_not_a_full_card() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_reason_is_written_before_advice_and_before_the_group_is_left(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[str, dict] = {}
    folder = tmp_path / "runs" / "full"

    def look(moment: str):
        ends[moment] = json.loads((folder / "exit.json").read_text())
        return "less"

    def fail(*args: object) -> None:
        raise FULL_CARD[2]

    monkeypatch.setattr(SoloEngine, "step", fail)
    monkeypatch.setattr(assemble, "memory_advice", lambda *given: look("advice"))
    close = SoloEngine.close
    monkeypatch.setattr(SoloEngine, "close", lambda self: (look("close"), close(self)))
    recipe = load_recipe(
        bench.recipe, overrides=['name="full"', f'output_dir="{tmp_path / "runs"}"', 'engine.name="solo"']
    )
    with pytest.raises(MachineError, match="memory ran out in the update of step 1"):
        train(recipe)
    assert list(ends) == ["advice", "close"]
    for end in ends.values():
        assert end["code"] == MachineError.exit_code
        assert "memory ran out in the update of step 1" in end["reason"]


def test_a_group_on_accelerators_is_left_to_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    for shares, expected in ((True, []), (False, ["left"])):
        monkeypatch.setattr(processes, "_shares_accelerators", lambda shares=shares: shares)
        with contextlib.suppress(RuntimeError), processes.leaving() as group:
            group.callback(left.append, "left")
            raise RuntimeError
        assert left == expected
    with processes.leaving() as group:
        group.callback(left.append, "done")
    assert left == ["left", "done"]


def test_a_rank_that_fails_alone_is_named_by_the_others_within_seconds(bench: Bench) -> None:
    settings = ['name="alone"', 'engine.name="fsdp2"']
    began = time.monotonic()
    codes = shared().script(
        2, [str(ROOT / "tests/dist/ends_worker.py"), str(bench.recipe), *settings], limit_s=120, env={}
    )
    took = time.monotonic() - began
    assert codes[1], codes
    said = json.loads((bench.folder / "runs" / "alone" / "exit.json").read_text())
    assert (said["code"], said["rank"]) == (MachineError.exit_code, 1), shared().stderr()[-3000:]
    assert "memory ran out in the update of step 1" in said["reason"]
    assert took < 100, "a rank that waits to be left waits until the hang's time is up: 1,800 s"
