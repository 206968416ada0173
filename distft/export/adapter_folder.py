"""The trained tensors alone, in the form of the adapter's library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distft.export.spec import ExportInputs, ExportSpec

if TYPE_CHECKING:
    from distft.core.registry import NoParams
    from distft.model.adapters import MethodSpec
    from distft.model.heads import HeadSpec


def _refuses(params: NoParams, method: MethodSpec, head: HeadSpec) -> str:
    return "" if method.adapter else f'method "{method.name}" trains no adapter'


def _write(params: NoParams, inputs: ExportInputs, folder: Path) -> None:
    from distft.export import final

    final.write_adapter(
        folder,
        inputs.engine,
        inputs.shapes,
        prefix=inputs.prefix,
        starts_at_zero=inputs.method.starts_at_zero,
        starts=inputs.starts,
        save_adapter=lambda target, tensors: inputs.method.save_adapter(inputs.lm, target, tensors),
        save_rest=inputs.write_beside,
    )


SPEC = ExportSpec(name="adapter", write=_write, refuses=_refuses)
