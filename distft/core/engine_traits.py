"""What methods and rules of recipes ask of an engine before there is one."""

from __future__ import annotations

from typing import Literal, Protocol

ParametersOnRank = Literal["whole", "cut by module", "cut by block"]
"""What a rank holds of parameters between forwards: all of them, or a part that is gathered for the time in which a
module or a block runs."""


class EngineTraits(Protocol):
    """An engine as it is declared (`distft.engine.EngineSpec`)."""

    @property
    def name(self) -> str:
        """The engine's name, for messages."""
        ...

    @property
    def parameters(self) -> ParametersOnRank:
        """What a rank holds of the parameters."""
        ...

    @property
    def flattens(self) -> bool:
        """Whether the optimizer gets 1-D pieces of tensors."""
        ...
