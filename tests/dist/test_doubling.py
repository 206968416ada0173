"""The sum of host numbers over all ranks: right, and the same bits on every rank, for any number of them."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from harness import environment

pytestmark = pytest.mark.dist
WORKER = """
import os, pickle, socket, sys
import torch
import torch.distributed as dist
from distft.engine import recursive_doubling
from distft.engine.base import BaseEngine
from distft.engine.recursive_doubling import summed
from distft.engine.processes import Processes

def rank_of(world, rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    found = []
    for round_ in range(20):
        mine = torch.tensor([rank + 1, 0.1 * (rank + 1) ** 3 + round_, rank == world - 1], dtype=torch.float64)
        before = mine.clone()
        found.append(summed(mine, rank, world).tolist())
        assert mine.equal(before)
    placed = Processes(
        rank=rank, world=world, local_rank=rank, device=torch.device("cpu"), launcher="torchrun", wants="", joined=True
    )
    engine, recursive_doubling.RING_RANKS = BaseEngine(placed), 4
    assert engine.all_true(True)
    assert not engine.all_true(rank != world - 1)
    found.append((engine.sum_over_ranks(rank, 0.1, 1), engine.gather_to_rank0({"rank": rank})))
    dist.barrier()
    return found

for world in map(int, sys.argv[2:]):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            with open(f"{sys.argv[1]}/{world}-{rank}", "wb") as file:
                pickle.dump(rank_of(world, rank, port), file)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
"""


def test_the_same_sum_on_every_rank(tmp_path: Path) -> None:
    worlds = (1, 2, 3, 4, 5, 8, 9)
    command = [sys.executable, "-c", WORKER, str(tmp_path), *map(str, worlds)]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    for world in worlds:
        said = [pickle.loads((tmp_path / f"{world}-{rank}").read_bytes()) for rank in range(world)]
        engines = [one.pop() for one in said]
        assert all(one == said[0] for one in said), "bit by bit"
        assert [sums for sums, _ in engines] == [engines[0][0]] * world
        assert engines[0][0] == pytest.approx([world * (world - 1) / 2, 0.1 * world, world])
        assert [collected for _, collected in engines] == [
            [{"rank": rank} for rank in range(world)],
            *[[]] * (world - 1),
        ]
        for round_, (ranks, odd, last) in enumerate(said[0]):
            assert ranks == world * (world + 1) / 2
            assert odd == pytest.approx(sum(0.1 * (rank + 1) ** 3 + round_ for rank in range(world)), rel=1e-14)
            assert last == 1.0
