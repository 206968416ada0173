import pytest
from harness import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One tiny model and one set of rows for every launch of the session."""
    return Bench.make(tmp_path_factory.mktemp("bench"))
