"""What a format of an exported model declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams, Params

if TYPE_CHECKING:
    from distft.export_formats.calibration import CalibrationRows
    from distft.export_formats.proof_rows import ProofRows
    from distft.export_formats.reference import SourceReference
    from distft.export_formats.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One comparison of the exported model with the one it was made of."""

    name: str
    compared: str
    """What with what, in words."""
    count: int
    """How many were compared."""
    value: float | int
    """What came out."""
    bound: str
    """What is allowed, in words."""
    ok: bool
    detail: str = ""
    """The first thing that differs, or what the value leaves out."""


@dataclass(frozen=True, kw_only=True)
class FormatInputs:
    """What a format may use. Functions compute once, when they are first called."""

    source: ModelSource
    whole_model: Callable[[], Path]
    """Folder of the whole model: the source's own, or its adapter merged into the base."""
    reference: Callable[[], SourceReference]
    """The source as transformers and PEFT compute it, which an export is compared with."""
    rows: Callable[[], ProofRows]
    """What is asked of both."""
    calibration: Callable[[], CalibrationRows | None]
    """Rows that rounding is fitted to; None where there are none, or none are wanted."""
    ask_task: bool = False
    """Whether the run's own questions are asked as well: for `--levels all` and `--max-drop`."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What one level of a format left in the folder."""

    files: tuple[str, ...]
    """Names in the folder that hold this level."""
    commands: tuple[str, ...]
    """How it is run, one command a line; PATH stands for the folder."""
    calibrated_on: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What its rounding was fitted to; empty: nothing."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found when the exported model ran."""

    runtime: str
    """Program and version that ran it; "" when nothing could."""
    checks: Sequence[Comparison] = ()
    figures: dict[str, float] = field(default_factory=dict)
    """Quality and speed of the level: kl_nats, perplexity, reference_perplexity, tokens_per_s."""
    task: Sequence[Mapping[str, Any]] = ()
    """Figures of the run's own rows that training made better: name, before, tuned, level, lost."""
    unproven: str = ""
    """Why nothing was run; "" where it was."""


def _never(params: Any, source: ModelSource) -> str:
    return ""


def _everything(params: Any, inputs: FormatInputs, level: str) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class ExportFormatSpec:
    """A named format."""

    name: str
    title: str
    """One line for help and cards."""
    write: Callable[[Any, FormatInputs, Path, str], Exported]
    """(params, inputs, folder, level) -> what was written into a folder that nobody reads yet."""
    prove: Callable[[Any, FormatInputs, Path, str], Proof]
    """(params, inputs, folder, level) -> the comparison of what was written with the reference."""
    params: type[Params] = NoParams
    levels: tuple[str, ...] = ()
    """Degrees of rounding, most exact first; empty: the format has none."""
    default_level: str = ""
    refuses: Callable[[Any, ModelSource], str] = _never
    """(params, source) -> why such a source has no such format; "" where it has."""
    calibrates: Callable[[str], bool] = lambda level: False
    """(level) -> whether its rounding is fitted to calibration rows, where there are some."""
    lacks: Callable[[Any, FormatInputs, str], str] = _everything
    """(params, inputs, level) -> why this level cannot be written here; "" where it can."""
