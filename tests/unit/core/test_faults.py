"""The fault injector: inert unless asked, exact when asked."""

import os
import signal
import subprocess
import sys

import pytest

from distft.core import faults
from distft.core.errors import MachineError


def test_inert_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.inject("P3", rank=0, step=4)


def test_fires_where_it_is_told_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise:rank=1,point=P3,step=4; enospc:point=eval, rank=0")
    monkeypatch.setattr(faults, "_injectors", {})
    for other in (("P3", 0, 4), ("P2", 1, 4), ("P3", 1, 5), ("P3", 1, None)):
        faults.inject(other[0], rank=other[1], step=other[2])
    with pytest.raises(faults.InjectedFault, match="injected at P3 of rank 1, step 4"):
        faults.inject("P3", rank=1, step=4)
    faults.inject("P3", rank=1, step=4)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(OSError, match="No space left on device"):
        faults.inject("eval")


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    injector = faults.Injector(faults.parse("raise:times=2"))
    for _ in range(2):
        with pytest.raises(faults.InjectedFault):
            injector.inject("micro", rank=3)
    injector.inject("micro", rank=3)


def test_some_may_pass_before() -> None:
    injector = faults.Injector(faults.parse("raise:point=backward,step=5,skip=2"))
    for _ in range(2):
        injector.inject("backward", step=5)
        injector.inject("backward", step=4)
    with pytest.raises(faults.InjectedFault):
        injector.inject("backward", step=5)
    injector.inject("backward", step=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("explode", 'unknown fault "explode"'),
        ("kill:when=3", 'cannot read "when=3"'),
        ("kill:rank=x", 'cannot read "rank=x"'),
        ("raise:point=", 'cannot read "point="'),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        faults.parse(text)


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_signals(kind: str, number: int) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\nfrom distft.core import faults\nfrom distft.checkpoint import lock\n"
    )
    code += "assert 'torch' not in sys.modules, 'must be usable before heavy imports'\nfaults.inject('import')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {faults.VARIABLE: f"{kind}:point=import"}, check=False
    )
    assert done.returncode == -number
