"""`awq`: weights in 4 bits, columns that matter scaled up before they are rounded."""

from pydantic import Field

from distft.core.registry import Params
from distft.export_formats.compressed_folder import compressed_spec
from distft.export_formats.llm_compressor import Rounding


class AwqParams(Params):
    """How weights are grouped."""

    group_size: int = Field(default=128, ge=16)
    """Numbers of a row that share a scale."""
    symmetric: bool = True
    """False: groups have a zero point as well, which loses less. vLLM's format has it; transformers 5.23 loads such a
    folder with `quantization_config=CompressedTensorsConfig(dequantize=True)` alone."""


def _rounding(params: AwqParams, level: str) -> Rounding:
    return Rounding(method="awq", bits=4, group_size=params.group_size, symmetric=params.symmetric)


SPEC = compressed_spec(
    name="awq",
    title="weights in 4 bits by AWQ, for vLLM and transformers (compressed-tensors)",
    levels=("W4A16",),
    rounding=_rounding,
    params=AwqParams,
)
