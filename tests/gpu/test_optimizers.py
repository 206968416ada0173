"""Every optimizer on a GPU: its state made early, saved and restored, paged or not, changes no bit."""

import pytest
import torch
from optimizer_kit import HERE, check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", HERE)
def test_made_early_saved_and_restored_it_changes_no_bit(name: str, device: torch.device) -> None:
    check(name, device)
