"""A trained model goes in; folders that other programs load come out: one file per form, one line here."""

from distft.core.registry import Registry
from distft.export import adapter_folder, model_folder
from distft.export.spec import ExportInputs, ExportSpec

EXPORTS: Registry[ExportSpec] = Registry("export")
EXPORTS.add(model_folder.SPEC)
EXPORTS.add(adapter_folder.SPEC)

__all__ = ["EXPORTS", "ExportInputs", "ExportSpec"]
