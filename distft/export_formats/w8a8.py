"""`w8a8`: weights and what goes into layers in 8-bit integers, weights fitted by GPTQ."""

from distft.core.registry import NoParams
from distft.export_formats.compressed_folder import compressed_spec
from distft.export_formats.llm_compressor import Rounding


def _rounding(params: NoParams, level: str) -> Rounding:
    return Rounding(method="gptq", bits=8, rounds_activations=True)


SPEC = compressed_spec(
    name="w8a8",
    title="8-bit integers with a scale for each token, for vLLM and transformers (compressed-tensors)",
    levels=("W8A8",),
    rounding=_rounding,
    params=NoParams,
)
