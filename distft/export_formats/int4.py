"""`int4`: weights in 4 bits, each rounded to nearest in groups of 128: what `[method] deploy = "int4"` trains for."""

from distft.core.registry import NoParams
from distft.export_formats.compressed_folder import compressed_spec
from distft.export_formats.llm_compressor import Rounding


def _rounding(params: NoParams, level: str) -> Rounding:
    from distft.model.adapters.deploy_grids import INT4_GROUP  # imports torch

    return Rounding(method="nearest", bits=4, group_size=INT4_GROUP)


SPEC = compressed_spec(
    name="int4",
    title="weights in 4 bits, rounded to nearest, for vLLM and transformers (compressed-tensors)",
    levels=("W4A16",),
    rounding=_rounding,
    params=NoParams,
)
