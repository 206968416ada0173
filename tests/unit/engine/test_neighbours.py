"""Whose processes a rank looks after: those of its own node, as far as the launcher says which they are."""

from distft.engine.processes import neighbours


def test_the_launchers_block_of_ranks() -> None:
    assert list(neighbours({"LOCAL_WORLD_SIZE": "8"}, 19, 512, 3)) == list(range(16, 24))
    assert list(neighbours({"SLURM_STEP_TASKS_PER_NODE": "8(x64)"}, 19, 512, 3)) == list(range(16, 24))


def test_where_it_does_not_say_all_of_a_small_world() -> None:
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}
    assert list(neighbours(uneven, 19, 20, 3)) == list(range(20))
    assert list(neighbours(uneven | {"SLURM_STEP_TASKS_PER_NODE": "8(x60),4"}, 19, 484, 3)) == []
