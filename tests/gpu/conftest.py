import pytest
import torch
from harness import Bench


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Everything here is about a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def bench(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One tiny model and one set of rows for every launch of the session."""
    return Bench.make(tmp_path_factory.mktemp("bench"))
