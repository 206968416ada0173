"""Two runs of one recipe, step by step and tensor by tensor: equal bit for bit, or from where on and how far off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.run_record import RunRecord, number

TOLERANCE = 1e-5
"""Relative, of losses and gradient norms in fp32 on another layout: what `docs/guide.md` promises."""
COLUMNS = ("loss", "grad_norm", "lr", "eval_loss")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure over the steps that both runs have."""

    name: str
    num_steps: int
    equal: bool
    """Every value, bit for bit."""
    first_step: int | None
    """The first step in which they differ."""
    worst: float
    """Largest relative difference; infinite where one is a number and the other is not."""
    worst_step: int | None


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """final/, compared by name."""

    num_tensors: int
    num_equal: int
    only_in_one: tuple[str, ...]
    worst: float
    """Largest difference of an element."""
    worst_relative: float
    """Largest of: greatest difference in a tensor over its greatest element."""
    worst_name: str

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return not self.only_in_one and self.num_equal == self.num_tensors


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Kept answers of both runs: what was written, how likely choices were, and the marks."""

    num_answers: int
    num_equal: int
    first: str
    """Set and row of the first that differs; "" none does."""
    missing: tuple[str, ...]
    """Sets that the second has not."""

    @property
    def equal(self) -> bool:
        """Whether all of them are equal."""
        return not self.missing and self.num_equal == self.num_answers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the second run, held against the first."""

    columns: tuple[Column, ...]
    tensors: Tensors | None
    """None: one of the two has no final/."""
    answers: Answers | None
    """None: the first has kept none."""
    missing_steps: int
    """Steps of the first that the second did not make, where it was to make them."""

    @property
    def equal(self) -> bool:
        """Whether all of it is equal, bit for bit."""
        columns_equal = all(column.equal for column in self.columns) and bool(self.columns)
        parts = [part.equal for part in (self.tensors, self.answers) if part is not None]
        return columns_equal and not self.missing_steps and all(parts)

    @property
    def within(self) -> bool:
        """Whether losses and norms are within the tolerance."""
        return (
            bool(self.columns) and not self.missing_steps and all(column.worst <= TOLERANCE for column in self.columns)
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"equal": self.equal, "within_1e-5": self.within}

    def lines(self) -> Iterator[str]:
        """Yield the outcome as lines for people."""
        for column in self.columns:
            if column.equal:
                yield f"{column.name:<10} equal in all {column.num_steps:,} values"
            else:
                yield (
                    f"{column.name:<10} differs from step {column.first_step} on, by at most {column.worst:.2g} "
                    f"of its value (step {column.worst_step})"
                )
        if self.missing_steps:
            yield f"{'steps':<10} {self.missing_steps:,} were not made"
        if self.tensors is not None:
            yield f"{'final/':<10} {self._about(self.tensors)}"
        if self.answers is not None:
            yield f"{'answers':<10} {_about_answers(self.answers)}"

    def _about(self, tensors: Tensors) -> str:
        if tensors.equal:
            return f"equal in all {tensors.num_tensors:,} tensors"
        if tensors.only_in_one:
            return f"not the same tensors: {', '.join(tensors.only_in_one[:5])} in one of the two"
        return (
            f"{tensors.num_tensors - tensors.num_equal:,} of {tensors.num_tensors:,} tensors differ, most in "
            f"{tensors.worst_name}: {tensors.worst:.2g}, {tensors.worst_relative:.2g} of its greatest element"
        )


def _about_answers(answers: Answers) -> str:
    if answers.missing:
        return f"not there: {', '.join(answers.missing[:5])}"
    if answers.equal:
        return f"equal in all {answers.num_answers:,} rows"
    return f"{answers.num_answers - answers.num_equal:,} of {answers.num_answers:,} rows differ, first {answers.first}"


def compare(first: RunRecord, second: RunRecord, *, until: int | None = None) -> Outcome:
    """Compare two runs; `until`: only steps up to this one, and then not the tensors, which are the end's."""
    columns = [_column(name, first, second, until) for name in COLUMNS]
    wanted = {record["step"] for record in first.steps if until is None or record["step"] <= until}
    made = {record["step"] for record in second.steps}
    return Outcome(
        columns=tuple(column for column in columns if column is not None),
        tensors=None if until is not None else _tensors(first.folder / "final", second.folder / "final"),
        answers=_answers(first, second, until),
        missing_steps=len(wanted - made),
    )


def _column(name: str, first: RunRecord, second: RunRecord, until: int | None) -> Column | None:
    first_values, second_values = _values(name, first), _values(name, second)
    shared = [step for step in first_values if step in second_values and (until is None or step <= until)]
    if not shared:
        return None
    unequal = [step for step in shared if first_values[step] != second_values[step]]
    off = {step: _relative(first_values[step], second_values[step]) for step in unequal}
    worst_step = max(off, key=off.__getitem__, default=None)
    return Column(
        name=name,
        num_steps=len(shared),
        equal=not unequal,
        first_step=unequal[0] if unequal else None,
        worst=off[worst_step] if worst_step is not None else 0.0,
        worst_step=worst_step,
    )


def _values(name: str, run: RunRecord) -> dict[int, Any]:
    records = run.evals if name == "eval_loss" else run.steps
    return {record["step"]: record[name] for record in records if name in record}


def _answers(first: RunRecord, second: RunRecord, until: int | None) -> Answers | None:
    """Compare the answers of the sets that training evaluated, not those evaluated afterwards under another label."""
    files = [
        path for path in sorted((first.folder / "eval").glob("*/*.jsonl")) if _evaluated_by(path.parent.name, until)
    ]
    if not files:
        return None
    count, equal, differing, missing = 0, 0, "", []
    for path in files:
        label, name = path.parent.name, path.stem
        ours, second_lines = first.answers(label, name), second.answers(label, name)
        if not second_lines:
            missing.append(f"{label}/{name}")
            continue
        count += len(ours)
        for row, line in ours.items():
            if line == second_lines.get(row):
                equal += 1
            elif not differing:
                differing = f"{label}/{name}, {row}"
    return Answers(num_answers=count, num_equal=equal, first=differing, missing=tuple(missing))


def _evaluated_by(label: str, until: int | None) -> bool:
    if label.startswith("step-"):
        return until is None or int(label.removeprefix("step-")) <= until
    return label == "before" or (until is None and label in ("after", "best"))


def _relative(first: Any, second: Any) -> float:
    a, b = number(first), number(second)
    if a is None or b is None:
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _tensors(first: Path, second: Path) -> Tensors | None:
    from safetensors import safe_open

    where: list[dict[str, Path]] = []
    for folder in (first, second):
        here: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                here |= dict.fromkeys(opened.keys(), file)
        where.append(here)
    if not where[0] or not where[1]:
        return None
    shared = sorted(where[0].keys() & where[1].keys())
    offs = {name: _off(name, where[0][name], where[1][name]) for name in shared}
    worst = max(offs, key=lambda name: offs[name][1], default="")
    return Tensors(
        num_tensors=len(shared),
        num_equal=sum(int(equal) for _, _, equal in offs.values()),
        only_in_one=tuple(sorted(where[0].keys() ^ where[1].keys())),
        worst=max((off for off, _, _ in offs.values()), default=0.0),
        worst_relative=offs[worst][1] if worst else 0.0,
        worst_name=worst,
    )


def _off(name: str, first_file: Path, second_file: Path) -> tuple[float, float, bool]:
    """Return (largest difference, the same over the largest element, whether all bits are equal) of one tensor."""
    import torch
    from safetensors import safe_open

    with safe_open(first_file, framework="pt") as first, safe_open(second_file, framework="pt") as second:
        a, b = first.get_tensor(name), second.get_tensor(name)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), float("inf"), False
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return 0.0, 0.0, True
    off = float((a.double() - b.double()).abs().max())
    return off, off / max(float(a.double().abs().max()), 1e-30), False
