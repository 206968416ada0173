"""The reference of answers that are written while training: left-out adapters, or weights that are kept."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distft.columns.reference import BY_TOKEN, ReferenceModel
from distft.core.errors import MachineError


@contextmanager
def whole_modules_are_trained() -> Iterator[None]:
    raise MachineError("lm_head is trained whole")
    yield


@contextmanager
def adapters_left_out() -> Iterator[None]:
    yield


class Weights:
    """An engine that has weights, and can have them again."""

    def __init__(self) -> None:
        self.now, self.entered = "start", 0

    def frozen_weights(self, reads: Callable[[str], bool]) -> Any:
        assert reads("lm.model.norm.weight")
        assert not reads("critic.norm.weight")
        copied = self.now

        @contextmanager
        def frozen() -> Iterator[None]:
            self.entered += 1
            trained, self.now = self.now, copied
            yield
            self.now = trained

        return frozen

    def place(self, batch: Any) -> Any:
        return batch

    def token_logprobs(self, batch: Any) -> str:
        return f"{self.now} {batch.position}"


def reference(alone: Any, *, written: bool, is_trained: bool = False, engine: Any = None) -> ReferenceModel:
    return ReferenceModel(
        policy=engine, engine=engine, base_alone=alone, row_passes=(), folder_of=Path, is_trained=is_trained,
        say=print, written_meanwhile=written,
    )  # fmt: skip


@pytest.mark.parametrize("alone", [None, whole_modules_are_trained])
def test_weights_that_cannot_be_left_out_are_kept(alone: Any) -> None:
    """Two exchanges a step, however many micro-batches it has; what is trained is there again afterwards."""
    engine = Weights()
    before = reference(alone, written=True, engine=engine).open()
    engine.now = "trained"
    inputs: Any = SimpleNamespace(reference=lambda: before)
    micros: Any = [SimpleNamespace(position=position, num_supervised=1) for position in (4, 7)]
    of = BY_TOKEN.open(inputs)(micros)
    assert [of(micro) for micro in micros] == ["start 4", "start 7"]
    assert (engine.now, engine.entered) == ("trained", 1)
    assert before(micros[0]) == "start 4"
    with pytest.raises(MachineError, match="only the trained one"):
        reference(alone, written=True, is_trained=True, engine=engine).open()


def test_adapters_are_left_out() -> None:
    made: AbstractContextManager[None] = adapters_left_out()
    assert callable(reference(lambda: made, written=True).open())
