"""A fixed piece of arithmetic on every rank's device: one that is throttled or shared takes longer than the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, names, ok, warn

FACTOR = 1.5


def look(here: Here) -> Facts:
    """Return the milliseconds of one matrix product, the fastest of some."""
    import torch

    from distft.health.straggler import StragglerProbe

    device = here.group.device if here.group is not None else _own_device(torch.cuda.is_available())
    here.gather(None)  # all at the same time, as in a run
    timing = StragglerProbe().read(0.0, torch.device(device))
    return {"ms": 1000 * timing.probe_s, "device": str(device)}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Report processes that are much slower than the others."""
    times = sorted(process.facts["ms"] for process in seen)
    usual = times[(len(times) - 1) // 2]
    slow = [process for process in seen if process.facts["ms"] > FACTOR * usual]
    if slow:
        listed = names(f"{process.who}, {process.facts['device']}: {process.facts['ms']:.2f} ms" for process in slow)
        yield warn(
            f"slower than the others ({usual:.2f} ms for a matrix product): {listed}",
            "something else runs there (top, nvidia-smi), or it is throttled",
            (process.host for process in slow),
        )
    else:
        yield ok(f"{usual:.2f} ms for a matrix product" + (f", at most {times[-1]:.2f}" if len(times) > 1 else ""))


def _own_device(has_gpu: bool) -> str:
    return "cuda:0" if has_gpu else "cpu"


CHECK = Check(name="arithmetic", look=look, judge=judge, together=True, short=False)
