"""What a generator declares about itself: the engine's own model, or a server that has its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distft.core.registry import NoParams, Params
from distft.generation.completion import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    from distft.core.types import Engine
    from distft.model.causal import CausalLM


class CompletionGenerator(Protocol):
    """Generates with the weights as they are when it is called. Collective: all ranks pass the same arguments."""

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        """Return a completion of each prompt, in order; None when some rank was asked to stop before the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class GeneratorInputs:
    """What a generator may use."""

    engine: Engine
    module: CausalLM
    """What the engine wraps."""
    decode: Callable[[list[int]], str]
    """Tokens of an answer -> its text, special tokens left out."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    stop: Callable[[], bool]
    """Whether this process was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """A named generator."""

    name: str
    open: Callable[[Any, GeneratorInputs], CompletionGenerator]
    """(params, inputs) -> the generator; collective. Raises MachineError: it cannot run here."""
    params: type[Params] = NoParams
