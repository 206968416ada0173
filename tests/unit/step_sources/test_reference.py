"""The reference of answers that are written while training: left-out adapters, or nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from distft.columns.reference import ReferenceModel
from distft.core.errors import MachineError


@contextmanager
def whole_modules_are_trained() -> Iterator[None]:
    raise MachineError("lm_head is trained whole")
    yield


@contextmanager
def adapters_left_out() -> Iterator[None]:
    yield


def reference(alone: Any, *, written: bool) -> ReferenceModel:
    nothing: Any = None
    return ReferenceModel(
        policy=nothing, engine=nothing, base_alone=alone, row_passes=(), folder_of=Path, is_trained=False,
        say=print, written_meanwhile=written,
    )  # fmt: skip


@pytest.mark.parametrize("alone", [None, whole_modules_are_trained])
def test_no_number_stands_in_for_a_model_that_is_gone(alone: Any) -> None:
    with pytest.raises(MachineError, match=r"beta = 0\.0"):
        reference(alone, written=True).open()
    reference(alone, written=False).open()


def test_adapters_are_left_out() -> None:
    made: AbstractContextManager[None] = adapters_left_out()
    assert callable(reference(lambda: made, written=True).open())
