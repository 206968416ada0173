"""Whose processes a rank looks after (those of its own node, as far as the launcher says), and how much it may open."""

import resource

import pytest

from distft.engine.processes import allow_files, neighbours


def test_the_launchers_block_of_ranks() -> None:
    assert list(neighbours({"LOCAL_WORLD_SIZE": "8"}, 19, 512, 3)) == list(range(16, 24))
    assert list(neighbours({"SLURM_STEP_TASKS_PER_NODE": "8(x64)"}, 19, 512, 3)) == list(range(16, 24))


def test_where_it_does_not_say_all_of_a_small_world() -> None:
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}
    assert list(neighbours(uneven, 19, 20, 3)) == list(range(20))
    assert list(neighbours(uneven | {"SLURM_STEP_TASKS_PER_NODE": "8(x60),4"}, 19, 484, 3)) == []


@pytest.mark.parametrize(
    ("soft", "hard", "world", "becomes"),
    [
        (1024, 1_048_576, 512, 1024 + 8 * 512),
        (1024, 4096, 512, 4096),
        (1024, resource.RLIM_INFINITY, 512, 1024 + 8 * 512),
        (1024, 1_048_576, 1, 1024 + 8),
        (65_536, 1_048_576, 512, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 512, None),
        (4096, 4096, 512, None),
    ],
)
def test_open_files_for_all_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, world: int, becomes: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    allow_files(world)
    assert asked == ([] if becomes is None else [(becomes, hard)])
