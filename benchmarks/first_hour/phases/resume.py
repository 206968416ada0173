"""A run that was killed goes on bit for bit, under [train] deterministic = true."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.first_hour import inputs, trained
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, Table

KILLED_AT = 5
SAVED_AT = 3


def steps(context: Context) -> Iterator[Step]:
    yield Step(name="left alone", run=lambda: trained.columns(trained.straight(context)), least_s=5)
    yield Step(name="killed and continued", run=lambda: _continued(context), least_s=10)


def _continued(context: Context) -> Measured:
    import signal

    own = 'model.dtype="bfloat16"'
    fault = f"kill:point=forward,step={KILLED_AT}"
    killed = (-signal.SIGKILL, 128 + signal.SIGKILL)
    folder = trained.run(context, "killed", own, codes=(0, *killed), DISTFT_FAULT=fault)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    trained.run(context, "killed", own)
    straight = trained.straight(context)
    ours, theirs = (_by_step(one) for one in (folder, straight))
    return {
        "saved": saved,
        "steps": len(theirs),
        "losses_equal": ours == theirs,
        "weights_equal": trained.digest(folder) == trained.digest(straight),
    }


def _by_step(folder: object) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm; of a step that was made twice, the later ones."""
    import json

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()  # type: ignore[operator]
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert len({record["step"] for record in steps}) == inputs.STEPS
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in steps}


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    if "killed and continued" not in measured:
        return
    said = measured["killed and continued"]
    rows = [
        ("checkpoint it went on from", said["saved"][-1] if said["saved"] else "none"),
        (f"losses and gradient norms of {said['steps']} steps", "equal" if said["losses_equal"] else "DIFFERENT"),
        ("final weights, bit for bit", "equal" if said["weights_equal"] else "DIFFERENT"),
    ]
    yield Table(caption=f"SIGKILL in step {KILLED_AT}", heads=("what", "found"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    said = measured.get("killed and continued", {"losses_equal": True, "weights_equal": True})
    if not said["losses_equal"]:
        yield "losses or gradient norms differ from those of the run that was left alone"
    if not said["weights_equal"]:
        yield "final weights differ from those of the run that was left alone"


PHASE = Phase(name="resume", title="Resume bit for bit", share=1.5, steps=steps, show=show, wrong=wrong)
