"""`fp8`: weights and what goes into layers in 8-bit floats, for GPUs that multiply them (Ada, Hopper and newer)."""

from distft.core.registry import NoParams
from distft.export_formats.compressed_folder import compressed_spec
from distft.export_formats.llm_compressor import Rounding


def _rounding(params: NoParams, level: str) -> Rounding:
    return Rounding(method="nearest", bits=8, type="float", rounds_activations=True)


SPEC = compressed_spec(
    name="fp8",
    title="8-bit floats with a scale for each token, for vLLM and transformers (compressed-tensors)",
    levels=("FP8",),
    rounding=_rounding,
    params=NoParams,
)
