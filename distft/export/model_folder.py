"""The whole model as transformers and inference servers load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distft.export.spec import ExportInputs, ExportSpec

if TYPE_CHECKING:
    from distft.core.registry import NoParams
    from distft.model.adapters import MethodSpec
    from distft.model.heads import HeadSpec


def _refuses(params: NoParams, method: MethodSpec, head: HeadSpec) -> str:
    return f'method "{method.name}" trains an adapter, which is not a whole model' if method.adapter else ""


def _write(params: NoParams, inputs: ExportInputs, folder: Path) -> None:
    from distft.export import final

    def write_rest(target: Path) -> None:
        inputs.write_config(target)
        inputs.write_beside(target)

    final.write_model(
        folder, inputs.engine, inputs.shapes, prefix=inputs.prefix, layout=inputs.layout, save_rest=write_rest
    )


SPEC = ExportSpec(name="model", write=_write, refuses=_refuses)
