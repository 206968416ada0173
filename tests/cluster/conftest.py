"""A Slurm for each process that runs tests; models, rows and uninterrupted runs are made once for all of them."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from harness import Bench, Run, run
from slurm import SAVE, Cluster, NoSlurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    yield from brought_up(tmp_path_factory.mktemp("slurm"), 2)


@pytest.fixture
def cluster3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three, for one test."""
    yield from brought_up(tmp_path_factory.mktemp("slurm3"), 3)


@pytest.fixture
def cluster64(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """64, which only say what they could run; they are up in a second too."""
    yield from brought_up(tmp_path_factory.mktemp("slurm64"), 64)


def brought_up(folder: Path, nodes: int) -> Iterator[Cluster]:
    try:
        up = Cluster.up(folder, nodes)
    except NoSlurm as error:
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(f"REQUIRE_SLURM=1, and {error}")
        pytest.skip(f"{error} (apt-get install slurmctld slurmd slurm-client munge)")
    yield up
    up.down()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Bench:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "bench"
    once(folder, lambda: (folder.mkdir(), Bench.make(folder)))
    return Bench(folder)


@pytest.fixture(scope="session")
def solo(bench: Bench) -> Run:
    """The run in one process, on no cluster."""
    return uninterrupted(bench, "solo", [sys.executable])


@pytest.fixture(scope="session")
def pair(bench: Bench) -> Run:
    """The uninterrupted run in two processes, on no cluster."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return uninterrupted(bench, "fsdp2", launcher)


def uninterrupted(bench: Bench, engine: str, launcher: list[str]) -> Run:
    name, folder = f"oracle-{engine}", bench.folder / "runs" / f"oracle-{engine}"
    settings = [f'name="{name}"', f'engine.name="{engine}"', SAVE]
    command = [*launcher, "-m", "distft.train", str(bench.recipe)]

    def make() -> None:
        done = run([*command, *(word for setting in settings for word in ("--set", setting))])
        assert done.returncode == 0, done.stderr[-3000:]

    once(folder, make)
    return Run.read({"folder": str(folder)})


def once(path: Path, make: Callable[[], object]) -> None:
    """Made by whichever test process comes first; the others wait."""
    path.parent.mkdir(exist_ok=True)
    made = path.with_name(f"{path.name}.made")
    with FileLock(path.with_name(f"{path.name}.making")):
        if not made.exists():
            make()
            made.touch()
