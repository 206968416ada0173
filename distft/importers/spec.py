"""What an importer declares about itself, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams, Params
from distft.importers.config_file import ConfigFile
from distft.importers.keys import KeyTable

if TYPE_CHECKING:
    from distft.importers.conversion import Conversion


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something to be said about a key of the file."""

    key: str
    """As `datasets[0].path`."""
    value: str
    line: int | None
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line is not None else "-"
        return f"{where:<8} {self.key} = {self.value}  {self.text}"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A recipe that was made from another tool's file."""

    tool: str
    toml: str
    """The recipe, with comments."""
    changed: dict[str, tuple[str, ...]]
    """Key of the recipe -> what means something else here."""
    left: tuple[Remark, ...]
    """Keys of the file that have no counterpart, and why."""
    unknown: tuple[Remark, ...]
    """Keys that the importer does not know."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        remarks = {"left": [vars(remark) for remark in self.left], "unknown": [vars(remark) for remark in self.unknown]}
        return {"tool": self.tool, "toml": self.toml, "changed": self.changed, **remarks}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the command line says that the file does not."""

    gpus: int | None = None
    """GPUs the file was meant for; None: not said."""
    task: str | None = None
    """What the tool was to do, where its file does not say it: sft, dpo, ..."""
    overrides: tuple[str, ...] = ()
    """`table.key=value` of the recipe, which count more than the file."""


@dataclass(frozen=True, kw_only=True)
class ImporterSpec:
    """A named tool whose files become recipes."""

    name: str
    title: str
    """What people call it."""
    told_by: str
    """What in a file shows that it is this tool's, for messages."""
    detects: Callable[[ConfigFile], bool]
    """Whether a file looks like this tool's; nothing is wrong with a file that does not."""
    convert: Callable[[Conversion], None]
    """Fills the draft; mistakes are reported to the conversion, all of them, and not raised."""
    keys: Mapping[str, KeyTable] = field(default_factory=dict)
    """What becomes of the keys: "" holds those at the top, "datasets[]" those of each entry of `datasets`."""
    params: type[Params] = NoParams
