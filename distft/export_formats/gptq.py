"""`gptq`: weights in 8 or 4 bits, each column's error made good by the columns that follow it."""

from pydantic import Field

from distft.core.registry import Params
from distft.export_formats.compressed_folder import compressed_spec
from distft.export_formats.llm_compressor import Rounding


class GptqParams(Params):
    """How weights are grouped."""

    group_size: int = Field(default=128, ge=16)
    """Numbers of a row that share a scale."""


def _rounding(params: GptqParams, level: str) -> Rounding:
    return Rounding(method="gptq", bits=int(level[1]), group_size=params.group_size)


SPEC = compressed_spec(
    name="gptq",
    title="weights in 4 or 8 bits by GPTQ, for vLLM and transformers (compressed-tensors)",
    levels=("W8A16", "W4A16"),
    rounding=_rounding,
    params=GptqParams,
)
