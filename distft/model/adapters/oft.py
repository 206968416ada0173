"""OFT: blocks of a layer's input are rotated by orthogonal matrices (PEFT).

Sources: https://arxiv.org/abs/2306.07280 (OFT), https://arxiv.org/abs/2506.19847 (Cayley-Neumann)
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distft.model.adapters.peft_tuner import TunerParamsOn4bit, tuner_spec


class OftParams(TunerParamsOn4bit):
    """PEFT's names."""

    oft_block_size: int = Field(default=32, ge=2)
    """Features that are rotated together; PEFT takes the next divisor where it divides a layer's inputs not."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of blocks that are not rotated, in training."""
    coft: bool = False
    """Keep the rotation within `eps` of none."""
    eps: float = Field(default=6e-5, gt=0)
    """How far `coft` lets it go."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    use_cayley_neumann: bool = True
    """Compute the rotation by a series instead of an inverse: faster, and orthogonal but for its rest."""
    num_cayley_neumann_terms: int = Field(default=5, ge=1)
    """Terms of that series."""


def _config(params: OftParams, settings: dict[str, Any]) -> Any:
    from peft import OFTConfig

    return OFTConfig(
        **settings,
        oft_block_size=params.oft_block_size,
        module_dropout=params.module_dropout,
        coft=params.coft,
        eps=params.eps,
        block_share=params.block_share,
        use_cayley_neumann=params.use_cayley_neumann,
        num_cayley_neumann_terms=params.num_cayley_neumann_terms,
    )


def _starts_at_zero(name: str) -> bool:
    return ".oft_R." in name


SPEC = tuner_spec(name="oft", title="OFT", params=OftParams, config=_config, starts_at_zero=_starts_at_zero)
