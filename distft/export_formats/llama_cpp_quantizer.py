"""K-quants, by llama.cpp's own quantiser through llama-cpp-python, where that is installed."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

from distft.core.errors import MachineError
from distft.core.optional import why_not

PACKAGE = "llama_cpp"
INSTALL = "pip install llama-cpp-python (it compiles llama.cpp: about 20 minutes of one core) brings the quantiser"
BLOCK = 256
"""Numbers of a K-quant's block. llama.cpp stores other rows as another type and says nothing."""


def lacks(model: Path, level: str) -> str:
    """Return why a level cannot be written here; "" where it can."""
    from distft.model.tensor_files import TensorFiles

    widths = {name: entry.shape[-1] for name, entry in TensorFiles(model).entries.items() if len(entry.shape) > 1}
    for name, width in sorted(widths.items()):
        if width % BLOCK:
            return (
                f"{name}: rows of {width} numbers are no multiple of {BLOCK}, and llama.cpp would store them "
                "in another type and say nothing  allowed: F32, F16, BF16; Q8_0, Q5_1 and Q4_0 for multiples of 32"
            )
    if reason := why_not(PACKAGE):
        return f"{reason}  {INSTALL}"
    return ""


def quantize(exact: Path, file: Path, level: str) -> None:
    """Write `file` at a K level from a GGUF file in F32.

    Raises:
        MachineError: llama.cpp refused.
    """
    llama_cpp: Any = importlib.import_module(PACKAGE)
    params: Any = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{level}")
    code = llama_cpp.llama_model_quantize(str(exact).encode(), str(file).encode(), ctypes.byref(params))
    if code != 0:
        raise MachineError(f"llama.cpp's quantiser refused {level} of {exact.name} with code {code}")
