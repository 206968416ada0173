"""Every optimizer on a GPU: its state made early, saved and restored, paged or not, changes no bit."""

from typing import Any

import pytest
import torch
from optimizer_kit import HERE, Life, check

from distft.optim import OPTIMIZERS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", HERE)
def test_made_early_saved_and_restored_it_changes_no_bit(name: str, device: torch.device) -> None:
    check(name, device)


@pytest.mark.parametrize("name", [name for name in HERE if OPTIMIZERS[name].library == "bitsandbytes"])
def test_without_a_wait_after_every_tensor_it_changes_no_bit(name: str, device: torch.device) -> None:
    """On torch's default stream and on another, against the library's own step."""
    theirs, ours, aside = Life(name, device), Life(name, device), Life(name, device)
    library: Any = type(theirs.optimizer).__mro__[1]
    theirs.optimizer.step = lambda: library.step(theirs.optimizer)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    for number in range(4):
        theirs.step(number)
        ours.step(number)
        with torch.cuda.stream(stream):
            aside.step(number)
    torch.cuda.synchronize(device)
    for key, expected in theirs.values().items():
        assert torch.equal(ours.values()[key], expected), key
        assert torch.equal(aside.values()[key], expected), key
