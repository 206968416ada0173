"""Who is blamed, case by case."""

from dataclasses import replace

import pytest

from distft.health.hang_diagnosis import diagnose_hang
from distft.health.heartbeat import Heartbeat, HeartbeatFile


def record(rank: int, **more) -> Heartbeat:
    process = {"host": f"node{rank // 2}", "pid": 100 + rank}
    known = {"phase": "backward", "step": 5, "passed": 40, "beats": 7, "waits": True, "at": "c10d.py:9 all_reduce"}
    return Heartbeat(rank=rank, process=process, **(known | more))


def looks(*records: Heartbeat, frozen: tuple[int, ...] = ()) -> tuple[dict, dict]:
    before = {r.rank: r for r in records}
    after = {r.rank: r if r.rank in frozen else replace(r, beats=r.beats + 2) for r in records}
    return before, after


@pytest.mark.row(41)
def test_a_frozen_rank_is_named_with_its_host_and_phase() -> None:
    said = diagnose_hang(*looks(record(0), record(1), record(2, device="cuda:0", phase="forward"), frozen=(2,)), 3)
    assert said == (
        "rank 2 (node1, process 102, cuda:0) shows no sign of life, last seen in forward of step 5 "
        "(at c10d.py:9 all_reduce)"
    )


@pytest.mark.row(41)
def test_a_rank_that_is_not_inside_a_collective_holds_the_others_up() -> None:
    said = diagnose_hang(*looks(record(0), record(1, waits=False, at="rows.py:3 read"), record(2)), 3)
    assert (
        said == "rank 1 (node0, process 101) is stuck in backward of step 5 (at rows.py:3 read), the others wait for it"
    )


def test_when_stacks_do_not_tell_the_one_behind_is_named() -> None:
    said = diagnose_hang(*looks(record(0), record(1, passed=39, phase="forward"), record(2)), 3)
    assert said.startswith("rank 1 (node0, process 101) is stuck in forward of step 5")


def test_when_all_stand_at_the_same_place_it_is_the_network() -> None:
    assert "the network between them" in diagnose_hang(*looks(record(0), record(1)), 2)


def test_between_hosts_it_is_their_network_that_is_named() -> None:
    said = diagnose_hang(*looks(record(0), record(2), record(4)), 0)
    assert said.endswith("the network between node0, node1 and node2, or a collective that never ends")
    many = diagnose_hang(*looks(*(record(rank) for rank in range(0, 128, 2))), 0)
    assert ", node15 and 56 more, or" in many, many
    behind = diagnose_hang(*looks(record(0), record(2, passed=39)), 0)
    assert behind.startswith("rank 2 (node1, process 102) is stuck in backward of step 5")
    assert behind.endswith("all of them wait inside collectives, so it may be the network between node0 and node1")


def test_ranks_that_ended_or_never_came() -> None:
    said = diagnose_hang(*looks(record(0), record(1, ended=3, reason="data: row 4")), 3)
    assert "rank 1 (node0, process 101) has ended with code 3: data: row 4" in said
    assert "rank 2 (never heard of)" in said


def test_records_are_overwritten_in_place_and_survive_nonsense(tmp_path) -> None:
    board = HeartbeatFile(tmp_path / "ranks", 1)
    board.open()
    board.write(record(1, reason="a" * 2000))
    board.write(record(1, reason="short"))
    (tmp_path / "ranks/00000.json").write_text("{")
    assert board.read(range(3)) == {1: record(1, reason="short")}
    board.write(record(1, reason="é\n" * 1000))
    board.mark("save", 9, 77)
    seen = board.read([1])[1]
    assert seen.reason.startswith("é\né")
    assert (seen.phase, seen.step, seen.passed, seen.beats) == ("save", 9, 77, 7)
    board.close()
