"""A wish to stop: counted, granted, forgotten."""

import os
import signal

import pytest

from distft.core.stop import PATIENCE, StopRequest


class Gone(Exception):
    pass


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    def gone(code: int) -> None:
        raise Gone(code)

    monkeypatch.setattr(os, "_exit", gone)
    return StopRequest()


def test_the_first_reason_stays_and_the_third_signal_ends_the_process(request_: StopRequest) -> None:
    request_._on_signal(signal.SIGUSR1, None)
    request_._on_signal(signal.SIGTERM, None)
    assert request_.requested()
    assert request_.reason == "SIGUSR1"
    with pytest.raises(Gone, match=str(128 + signal.SIGTERM)):
        request_._on_signal(signal.SIGTERM, None)


def test_once_the_state_is_saved_signals_cut_nothing_short(request_: StopRequest) -> None:
    request_.ask("the launcher's end")
    request_.granted()
    for _ in range(2 * PATIENCE):
        request_._on_signal(signal.SIGTERM, None)
    assert request_.reason == "the launcher's end"
    request_.clear()
    assert not request_.requested()
