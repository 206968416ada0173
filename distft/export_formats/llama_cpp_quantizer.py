"""K-quants, by llama.cpp's own code: `ggml_quantize_chunk` of the library that xllamacpp brings.

The binding has no Python function for it, but its library exports the function of llama.cpp's public header (ggml.h),
which llama.cpp's own tool calls for each tensor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError
from distft.core.optional import why_not

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "xllamacpp"
INSTALL = f"pip install 'distft[export]' brings {PACKAGE}, whose llama.cpp rounds to K levels"
_FUNCTION = "ggml_quantize_chunk"


def missing() -> str:
    """Return why K levels cannot be written here; "" where they can."""
    if reason := why_not(PACKAGE):
        return f"{reason}  {INSTALL}"
    if not hasattr(_library(), _FUNCTION):
        return f"this {PACKAGE} exports no {_FUNCTION}  fix: install the version of constraints.txt"
    return ""


def quantize_rows(values: np.ndarray[Any, Any], quant: str, importance: np.ndarray[Any, Any] | None) -> Any:
    """Return rows of numbers in a K type.

    Args:
        values: fp32 [rows, I]; I is a multiple of the type's block.
        quant: name of a `gguf.GGMLQuantizationType`.
        importance: fp32 [I], how much an error of each column weighs; None: by the numbers themselves.

    Returns:
        bytes, uint8 [rows, bytes of a row].

    Raises:
        MachineError: llama.cpp is not there, or its types are numbered otherwise than gguf-py's.
    """
    import gguf
    import numpy as np
    import torch

    if reason := missing():
        raise MachineError(reason)
    kind = gguf.GGMLQuantizationType[quant]
    theirs: Any = importlib.import_module(PACKAGE).ggml_type
    if int(theirs[f"GGML_TYPE_{quant}"]) != int(kind):
        raise MachineError(f"{PACKAGE} and gguf number the type {quant} differently: install those of constraints.txt")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = values.shape
    if width % block or values.dtype != np.float32 or not values.flags.c_contiguous:
        raise AssertionError("rows are multiples of the block, in fp32, one after another")
    if importance is not None and importance.shape != (width,):
        raise AssertionError("one weight for each column")
    made = np.empty((rows, width // block * size), dtype=np.uint8)
    function = getattr(_library(), _FUNCTION)
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights = None if importance is None else importance.ctypes.data

    def chunk(first: int, last: int) -> int:
        # The library lets go of Python's lock: threads share the rows.
        return function(int(kind), values.ctypes.data, made.ctypes.data, first * width, last - first, width, weights)

    num_threads = max(1, min(torch.get_num_threads(), rows // 64))
    cuts = [rows * part // num_threads for part in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        written = sum(pool.map(chunk, cuts[:-1], cuts[1:]))
    if written != made.nbytes:
        raise MachineError(f"llama.cpp wrote {written} bytes of {quant} where {made.nbytes} were expected")
    return made


@functools.cache
def _library() -> ctypes.CDLL:
    binding: Any = importlib.import_module(f"{PACKAGE}.{PACKAGE}")
    return ctypes.CDLL(binding.__file__)
