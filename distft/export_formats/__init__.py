"""A trained model goes in; what other programs run comes out, with a certificate: one file per format, one line here.

The room `distft.export` writes what a training run leaves; this one is `distft export`.
"""

from distft.core.registry import Registry
from distft.export_formats import awq, fp8, gguf_file, gptq, int4, ollama, peft_adapter, safetensors_folder, w8a8
from distft.export_formats.spec import Comparison, Exported, ExportFormatSpec, FormatInputs, Proof

EXPORT_FORMATS: Registry[ExportFormatSpec] = Registry("export format")
EXPORT_FORMATS.add(safetensors_folder.SPEC)
EXPORT_FORMATS.add(peft_adapter.SPEC)
EXPORT_FORMATS.add(gguf_file.SPEC)
EXPORT_FORMATS.add(ollama.SPEC)
EXPORT_FORMATS.add(fp8.SPEC)
EXPORT_FORMATS.add(w8a8.SPEC)
EXPORT_FORMATS.add(int4.SPEC)
EXPORT_FORMATS.add(gptq.SPEC)
EXPORT_FORMATS.add(awq.SPEC)

__all__ = ["EXPORT_FORMATS", "Comparison", "ExportFormatSpec", "Exported", "FormatInputs", "Proof"]
