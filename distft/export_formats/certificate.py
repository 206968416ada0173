"""certificate.json: what was compared, on which rows, in which runtime and version, with which result; hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distft.core.errors import NumericError
from distft.core.files import replace_json
from distft.export_formats.noted_options import FILE
from distft.export_formats.source import ModelSource
from distft.export_formats.spec import Comparison, Exported, Proof

_NAMED = ("distft", "torch", "transformers", "peft", "gguf", "xllamacpp", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True, kw_only=True)
class LevelRecord:
    """One level as it was written and found."""

    level: str
    """"" of formats without levels."""
    exported: Exported
    proof: Proof
    num_bytes: int

    @property
    def failed(self) -> list[Comparison]:
        """Comparisons that came out wrong."""
        return [check for check in self.proof.checks if not check.ok]


def write(
    folder: Path,
    *,
    format_name: str,
    source: ModelSource,
    rows: Mapping[str, Any],
    levels: Sequence[LevelRecord],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the certificate into the folder and return it."""
    content = {
        "format": format_name,
        "proven": all(not record.proof.unproven for record in levels),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {
            "given": source.given,
            "label": source.label,
            "adapter": source.is_adapter,
            "files": hashes(source.folder),
            "base": _base(source),
        },
        "options": dict(options),
        "rows": dict(rows),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "levels": [_level(record) for record in levels],
        "files": hashes(folder),
    }
    replace_json(folder / FILE, content, indent=1, ensure_ascii=False)
    return content


def _base(source: ModelSource) -> dict[str, Any] | None:
    """Return folder and hashes of an adapter's base; None for a whole model."""
    if not source.is_adapter:
        return None
    from distft.merging.base_model import base_hashes
    from distft.model.adapters.whole import base_of

    folder = base_of(source.folder)
    return {"path": str(folder), "files": base_hashes(folder)}


def _level(record: LevelRecord) -> dict[str, Any]:
    return {
        "level": record.level,
        "files": list(record.exported.files),
        "bytes": record.num_bytes,
        "calibrated_on": dict(record.exported.calibrated_on),
        "runtime": record.proof.runtime,
        "unproven": record.proof.unproven,
        "figures": record.proof.figures,
        "task": [dict(figure) for figure in record.proof.task],
        "commands": list(record.exported.commands),
        "checks": [asdict(check) for check in record.proof.checks],
    }


def refuse_failed(records: Sequence[LevelRecord], source: ModelSource, format_name: str) -> None:
    """Refuse an export that does not do what its source does.

    Raises:
        NumericError: a comparison came out wrong; names each with what was found and allowed.
    """
    lines = [f"  {line}" for record in records for line in _failures(record)]
    if lines:
        head = f"{source.given} as {format_name} does not do what its source does, and was not kept:"
        raise NumericError("\n".join([head, *lines]))


def _failures(record: LevelRecord) -> Iterator[str]:
    for check in record.failed:
        level = f"{record.level}: " if record.level else ""
        value = check.value if isinstance(check.value, int) else f"{check.value:.4g}"
        detail = f"  ({check.detail})" if check.detail else ""
        yield f"{level}{check.name}: {value} of {check.count}, allowed {check.bound}{detail}"


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file in a folder but the certificate."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def changed_files(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Return names of files that are not as the certificate says, more or missing; README.md may be edited."""
    then, now = content["files"], hashes(folder)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name) and name != "README.md")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what made and compared the files."""
    found = {"python": platform.python_version()}
    for name in _NAMED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
