"""What was measured on a GPU becomes the rates that plans for it use; kept per GPU, with date and commit.

The measurement (`make gpu-first` writes it as calibration.json) has rates of single kernels and step times of whole
cases, each with the work that the planner saw in it. Real steps reach less than single kernels, so the kernels' rates
are where a fit to the step times begins, and what it stays with where the steps do not tell.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distft.core import accelerators
from distft.core.accelerators import GIB, Accelerator
from distft.core.cache import cache_root
from distft.core.errors import Problem, RecipeError
from distft.core.files import replace_json
from distft.plan.rates import ASSUMED, HardwareRates, Work, times

SCHEMA = 1
VARIABLE = "DISTFT_CALIBRATION"
"""Names the file that calibrations are kept in, where it is not `calibration.json` in distft's cache folder."""
LARGE_BYTES = GIB
"""Allocated by a case from which on its fragmentation says something."""
MOST_CONTEXT_BYTES = 6 * GIB
MOST_FRAGMENTATION = 0.5
MOST_LAUNCH_S = 1e-3
MOST_ERROR = 0.25
"""Mean error of fitted step times beyond which they are not of one GPU's rates: nothing is kept."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Bytes = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Kernels(_Strict):
    """Rates of single kernels on one GPU; None where it was not measured."""

    matmul_flops_per_s: _Positive | None = None
    attention_flops_per_s: _Positive | None = None
    copy_bytes_per_s: _Positive | None = None
    """Bytes read and written."""
    launch_s: _Positive | None = None
    pcie_bytes_per_s: _Positive | None = None
    link_bytes_per_s: _Positive | None = None
    """Sent by each rank of a large all-gather between GPUs of one node."""


class Measured(_Strict):
    """One case of `distft bench`: its median step, the planner's view of it, and the device's memory."""

    name: str
    device: str
    world: Annotated[int, Field(ge=1)]
    step_s: _Positive
    work: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)] | int]
    allocated_bytes: _Bytes | None = None
    reserved_bytes: _Bytes | None = None
    used_bytes: _Bytes | None = None


class Measurement(_Strict):
    """calibration.json."""

    schema_: Annotated[int, Field(alias="schema")]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}")]
    commit: Annotated[str, Field(min_length=1)]
    device: str
    """The driver's product name."""
    versions: dict[str, str]
    kernels: Kernels
    cases: list[Measured]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rates of one GPU and how well they say what was measured."""

    gpu: Accelerator
    rates: HardwareRates
    cases: int
    error_before: float | None
    """Mean relative error of the step times that were predicted with the assumed rates; None without cases."""
    error: float | None
    """Error with these rates."""

    def lines(self) -> Iterator[str]:
        """Yield what changed."""
        yield f"{self.gpu.name}: {self.rates.source}"
        for field in fields(HardwareRates):
            before, now = getattr(ASSUMED, field.name), getattr(self.rates, field.name)
            if field.name != "source" and before != now:
                yield f"  {field.name:<24} {_shown(field.name, before)} -> {_shown(field.name, now)}"
        if self.error is not None and self.error_before is not None:
            yield f"  step times of {self.cases} cases: {self.error_before:.1%} off before, {self.error:.1%} now"


def place(named: str | None = None) -> Path:
    """Return where calibrations are kept: the named file, that of DISTFT_CALIBRATION, or one in the cache folder."""
    chosen = named or os.environ.get(VARIABLE)
    return Path(chosen) if chosen else cache_root() / "calibration.json"


# -- from a measurement ----------------------------------------------------------------------------------------------


def read(path: Path, *, gpu: str | None = None) -> Calibration:
    """Return the calibration that follows from the measurement in `path`; `gpu`: the one that the user means.

    Raises:
        RecipeError: it is no measurement, of a device without a data sheet, of another GPU than `gpu`, or says what
            that GPU cannot do.
    """
    try:
        measured = Measurement.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _refused(path, [Problem(message=f"cannot be read: {error.strerror}")]) from None
    except ValidationError as error:
        mistakes = [
            Problem(message=f"{'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}")
            for detail in error.errors()
        ]
        raise _refused(path, mistakes, "the calibration.json that make gpu-first writes") from None
    if measured.schema_ != SCHEMA:
        raise _refused(path, [Problem(message=f"schema: {measured.schema_}, this version reads {SCHEMA}")])
    accelerator = accelerators.of_device(measured.device)
    if accelerator is None:
        message = f'device: "{measured.device}" is not in the catalogue, and rates are kept as shares of a data sheet'
        fix = "add a row to distft/core/accelerators.py; a CPU is never calibrated"
        raise _refused(path, [Problem(message=message, fix=fix)])
    problems = list(_nonsense(measured, accelerator, gpu))
    if problems:
        raise _refused(path, problems)
    calibration = _calibrated(measured, accelerator)
    if calibration.error is not None and calibration.error > MOST_ERROR:
        message = (
            f"cases: fitted rates leave step times {calibration.error:.0%} off; they are not those of one GPU at work"
        )
        raise _refused(path, [Problem(message=message, fix="measure again on a GPU that nobody else uses")])
    return calibration


def _refused(path: Path, problems: Sequence[Problem], wanted: str = "") -> RecipeError:
    with_fixes = [replace(problem, fix=problem.fix or wanted) for problem in problems]
    return RecipeError(f"distft plan --calibrate {path}", with_fixes)


def _nonsense(measured: Measurement, accelerator: Accelerator, gpu: str | None) -> Iterator[Problem]:
    """Yield what cannot be true of this GPU."""
    if gpu is not None:
        try:
            meant = accelerators.named(gpu)
        except KeyError:
            meant = None
        if meant != accelerator:
            yield Problem(message=f"device: {measured.device} is {accelerator.name}, not --gpu {gpu}")
    kernels = measured.kernels
    for name, peak, unit in (
        ("matmul_flops_per_s", accelerator.bf16_flops, "FLOP/s"),
        ("attention_flops_per_s", accelerator.bf16_flops, "FLOP/s"),
        ("copy_bytes_per_s", accelerator.memory_bytes_per_s, "bytes/s"),
        ("link_bytes_per_s", accelerator.link_bytes_per_s, "bytes/s"),
    ):
        rate = getattr(kernels, name)
        if rate is not None and rate > peak:
            yield Problem(message=f"kernels.{name}: {rate:.4g} is above {accelerator.name}'s peak, {peak:.4g} {unit}")
    if kernels.launch_s is not None and kernels.launch_s > MOST_LAUNCH_S:
        yield Problem(message=f"kernels.launch_s: {kernels.launch_s:g} is no launch, at most {MOST_LAUNCH_S:g}")
    names = {field.name for field in fields(Work)}
    for number, case in enumerate(measured.cases):
        where = f"cases.{number} ({case.name})"
        if case.device != measured.device:
            yield Problem(message=f"{where}: measured on {case.device}, the file is of {measured.device}")
        if unknown := sorted(set(case.work) ^ names):
            yield Problem(message=f"{where}: work has not the fields of this version: {', '.join(unknown)}")
            continue
        work = _work(case)
        least = work.micros * (work.matmul_flops + work.attention_flops) / accelerator.bf16_flops
        if case.step_s < least:
            yield Problem(message=f"{where}: a step of {case.step_s:g} s is faster than the peak allows, {least:.4g} s")
        yield from _impossible_memory(where, case)


def _impossible_memory(where: str, case: Measured) -> Iterator[Problem]:
    sizes = [case.allocated_bytes, case.reserved_bytes, case.used_bytes]
    given = [size for size in sizes if size is not None]
    if given and (len(given) != 3 or given != sorted(given)):
        yield Problem(message=f"{where}: allocated, reserved and used bytes must be all there and grow: {sizes}")
    elif given and given[2] - given[1] > MOST_CONTEXT_BYTES:
        beside = (given[2] - given[1]) / GIB
        yield Problem(message=f"{where}: {beside:.1f} GiB of the device belong to somebody else than this process")


def _work(case: Measured) -> Work:
    return Work(**(case.work | {"micros": int(case.work["micros"])}))  # type: ignore[arg-type]  # the rest are floats


def _calibrated(measured: Measurement, accelerator: Accelerator) -> Calibration:
    kernels = measured.kernels
    shares = {
        "matmul": kernels.matmul_flops_per_s and kernels.matmul_flops_per_s / accelerator.bf16_flops,
        "attention": kernels.attention_flops_per_s and kernels.attention_flops_per_s / accelerator.bf16_flops,
        "memory": kernels.copy_bytes_per_s and kernels.copy_bytes_per_s / accelerator.memory_bytes_per_s,
        "link": kernels.link_bytes_per_s and kernels.link_bytes_per_s / accelerator.link_bytes_per_s,
        "launch_s": kernels.launch_s,
        "pcie_bytes_per_s": kernels.pcie_bytes_per_s,
    }
    begin = replace(ASSUMED, **{key: value for key, value in shares.items() if value is not None})
    alone = [case for case in measured.cases if case.world == 1]
    steps = [(_work(case), case.step_s) for case in alone]
    rates = replace(fit(steps, begin, accelerator), **_memory(measured.cases))
    commit = measured.commit[:9]
    rates = replace(rates, source=f"calibrated {measured.date[:10]} on {measured.device}, commit {commit}")
    return Calibration(
        gpu=accelerator,
        rates=rates,
        cases=len(steps),
        error_before=_error(steps, ASSUMED, accelerator),
        error=_error(steps, rates, accelerator),
    )


def _memory(cases: Sequence[Measured]) -> dict[str, Any]:
    """Return context, NCCL's buffers and fragmentation, as medians of the cases that measured memory."""
    complete = [case for case in cases if case.allocated_bytes is not None]
    rates: dict[str, Any] = {}
    alone = [_beside(case) for case in complete if case.world == 1]
    if alone:
        rates["context_bytes"] = int(statistics.median(alone))
    together = [_beside(case) for case in complete if case.world > 1]
    if together and alone:
        rates["nccl_bytes"] = max(0, int(statistics.median(together)) - rates["context_bytes"])
    lost = [
        (case.reserved_bytes or 0) / case.allocated_bytes - 1
        for case in complete
        if case.allocated_bytes and case.allocated_bytes >= LARGE_BYTES
    ]
    if lost:
        rates["fragmentation"] = min(MOST_FRAGMENTATION, statistics.median(lost))
    return rates


def _beside(case: Measured) -> int:
    return (case.used_bytes or 0) - (case.reserved_bytes or 0)


# -- the fit ---------------------------------------------------------------------------------------------------------

FITTED = ("matmul", "attention", "memory", "launch_s")
_HOLD = 0.02
"""Weight of where a rate began, against a case's step time: only what no case tells stays there."""
_ROUNDS = 60


def fit(steps: Sequence[tuple[Work, float]], begin: HardwareRates, gpu: Accelerator) -> HardwareRates:
    """Fit rates, at most the peaks, whose predictions are nearest to the measured (work, seconds): least squares.

    In logarithms of rates and times (Levenberg and Marquardt), so that every case counts alike.
    """
    import numpy as np

    if not steps:
        return begin
    start = np.log([getattr(begin, name) for name in FITTED])
    top = np.log([1.0, 1.0, 1.0, MOST_LAUNCH_S])

    def off(point: Any) -> Any:
        rates = _with(begin, point)
        misses = [math.log(times(work, rates, gpu).step_s / seconds) for work, seconds in steps]
        return np.array([*misses, *(_HOLD * (point - start))])

    return _with(begin, _least_squares(off, start, top))


def _with(begin: HardwareRates, point: Any) -> HardwareRates:
    return replace(begin, **{name: math.exp(value) for name, value in zip(FITTED, point, strict=True)})


def _least_squares(off: Callable[[Any], Any], start: Any, top: Any) -> Any:
    """Return the point, nowhere above `top`, where the sum of the squares of `off` is least."""
    import numpy as np

    point, missed, damping = np.minimum(start, top), None, 1e-3
    for _ in range(_ROUNDS):
        missed = off(point)
        slopes = np.stack([(off(point + step) - missed) / 1e-5 for step in 1e-5 * np.eye(len(point))], axis=1)
        square = slopes.T @ slopes
        turn = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-12), -slopes.T @ missed)
        trial = np.minimum(point + np.clip(turn, -1.0, 1.0), top)
        if np.square(off(trial)).sum() < np.square(missed).sum():
            point, damping = trial, damping / 3
        else:
            damping *= 4
        if damping > 1e9 or np.abs(turn).max() < 1e-9:
            break
    return point


def _error(steps: Sequence[tuple[Work, float]], rates: HardwareRates, gpu: Accelerator) -> float | None:
    if not steps:
        return None
    return statistics.fmean(abs(times(work, rates, gpu).step_s / seconds - 1) for work, seconds in steps)


# -- kept ------------------------------------------------------------------------------------------------------------


def keep(calibration: Calibration, path: Path) -> None:
    """Keep the calibration beside those of other GPUs, in place of an earlier one of its own.

    Raises:
        RecipeError: the file there is not one of calibrations.
    """
    kept = _kept(path)
    kept[calibration.gpu.name] = asdict(calibration.rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, {"schema": SCHEMA, "gpus": kept}, indent=1)


def of_gpu(gpu: Accelerator, path: Path | None = None) -> HardwareRates:
    """Return the rates that plans for `gpu` use: its calibration's where one is kept, else those that are assumed.

    Raises:
        RecipeError: the file of calibrations is damaged.
    """
    path = path or place()
    kept = _kept(path).get(gpu.name)
    if kept is None:
        return ASSUMED
    names = {field.name for field in fields(HardwareRates)}
    sound = isinstance(kept, dict) and set(kept) == names and isinstance(kept["source"], str)
    numbers = [value for key, value in kept.items() if key != "source"] if sound else []
    if not sound or not all(isinstance(value, int | float) and value >= 0 for value in numbers):
        message = f"gpus.{gpu.name}: not the rates of this version"
        raise RecipeError(str(path), [Problem(message=message, fix="calibrate again, or delete the file")])
    return HardwareRates(**kept)


def _kept(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RecipeError(str(path), [Problem(message=f"cannot be read: {error.strerror}")]) from None
    try:
        whole = json.loads(text)
        if whole["schema"] != SCHEMA:
            raise ValueError
        return dict(whole["gpus"])
    except (ValueError, KeyError, TypeError):
        problem = Problem(message="not a file of calibrations", fix="name another by DISTFT_CALIBRATION, or delete it")
        raise RecipeError(str(path), [problem]) from None


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if name.endswith("_per_s"):
        return f"{value / 1e9:.1f} GB/s"
    return f"{value * 1e6:.2f} us" if name.endswith("_s") else f"{value:.1%}"
