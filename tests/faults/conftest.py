from collections.abc import Callable, Iterator

import pytest
from forks import Forks
from harness import STEPS, Bench, End, Job


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="session")
def oracle(bench: Bench, forks: Forks) -> Callable[..., End]:
    """`oracle(engine, *settings)`: how an uninterrupted run ends."""
    known: dict[tuple[str, ...], End] = {}

    def end_of(engine: str, *settings: str) -> End:
        key = (engine, *settings)
        if key not in known:
            job = Job(bench, f"oracle-{len(known)}", engine, settings)
            assert forks.run(job) == [0, 0], forks.stderr()
            assert job.exit()["code"] == 0
            known[key] = job.result()
            assert settings or len(known[key].losses) == STEPS
        return known[key]

    return end_of
