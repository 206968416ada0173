"""Which ends lead back into the queue: a table, for this decides over nights."""

from dataclasses import replace
from pathlib import Path

import pytest

from distft.cluster.restart_policy import JobEnd, Phase, Then, judge, read_exit, record_of

SAVED = {"code": 75, "reason": "preempted: stopped by SIGUSR1 after step 7; the state is saved", "step": 7}
PREEMPTED = JobEnd(
    status=75, record=SAVED, stop_requested=True, stop_file=False, phase=Phase.RUNNING, stalled=1, max_stalled=3
)  # fmt: skip


def test_preempted_and_saved_goes_back_into_the_queue() -> None:
    verdict = judge(PREEMPTED)
    assert (verdict.then, verdict.code, verdict.exit_code) == (Then.REQUEUE, 75, 75)
    assert verdict.reason == SAVED["reason"]


@pytest.mark.parametrize("status", [1, 75, 137, 143], ids="status {}".format)
def test_the_launchers_status_does_not_matter(status: int) -> None:
    """torchrun says 1 for everything."""
    assert judge(replace(PREEMPTED, status=status)).then is Then.REQUEUE
    assert judge(replace(PREEMPTED, status=status, record={"code": 5, "reason": "numeric"})).exit_code == 5


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7, 8, 9, 130])
def test_own_faults_are_not_started_again(code: int) -> None:
    verdict = judge(replace(PREEMPTED, record={"code": code, "reason": "numeric: step 3: loss nan"}))
    assert (verdict.then, verdict.exit_code) == (Then.END, code)
    assert verdict.reason == "numeric: step 3: loss nan"
    assert verdict.why.startswith("not requeued: the run ended by its own fault")


def test_complete_is_complete_whatever_else_is_known() -> None:
    """A signal that came too late, an exit.json that is older: the run was found complete and said nothing new."""
    verdict = judge(replace(PREEMPTED, status=0, record=None))
    assert (verdict.then, verdict.exit_code) == (Then.END, 0)


def test_killed_without_a_word_is_a_crash() -> None:
    verdict = judge(replace(PREEMPTED, status=137, record=None, stop_requested=False))
    assert (verdict.then, verdict.exit_code) == (Then.END, 1)
    assert "status 137" in verdict.reason


def test_asked_before_it_could_speak_is_preempted() -> None:
    assert judge(replace(PREEMPTED, status=138, record=None)).then is Then.REQUEUE


def test_slurm_decides_about_jobs_it_ends() -> None:
    """`scontrol requeue` brings a cancelled job back to life."""
    assert judge(replace(PREEMPTED, phase=Phase.ENDING)).then is Then.END
    assert judge(replace(PREEMPTED, phase=Phase.TIME_LIMIT)).then is Then.REQUEUE


def test_a_person_asked_by_the_stop_file() -> None:
    verdict = judge(replace(PREEMPTED, stop_file=True))
    assert verdict.then is Then.END
    assert "remove it" in verdict.why


def test_restarts_without_progress_are_limited() -> None:
    allowed = [judge(replace(PREEMPTED, stalled=count)).then is Then.REQUEUE for count in range(1, 6)]
    assert allowed == [True, True, True, False, False], "a first start and three restarts"
    last = judge(replace(PREEMPTED, stalled=4))
    assert last.exit_code == 1, "not 75: a site may requeue that"
    assert last.code == 75
    assert "4 starts in a row began at the same checkpoint" in last.why
    assert judge(replace(PREEMPTED, stalled=1, max_stalled=0)).then is Then.END


def test_exit_json_counts_only_when_this_start_wrote_it(tmp_path: Path) -> None:
    assert read_exit(tmp_path) is None
    old = '{"code": 75, "reason": "an earlier start"}'
    (tmp_path / "exit.json").write_text(old)
    assert read_exit(tmp_path) == old
    assert record_of(old, old) is None
    assert record_of(old, None) is None, "this start removed it and was killed"
    assert record_of(None, old) == {"code": 75, "reason": "an earlier start"}
    assert record_of(old, '{"code": 5') is None
    assert record_of(old, '["code"]') is None
    assert record_of(old, '{"reason": "no code"}') is None
