"""What a generator declares about itself: the engine's own model, or a server that has its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def _never(params: Any, method: Any, method_params: Any) -> str:
    return ""


def _draws_all(temperature: float, top_p: float) -> str:
    return ""


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
    dtype: str
    """What the model computes in, as [model] dtype says."""
    folder: Path
    """Where it may keep files of the run; need not exist."""
    write_adapter: Callable[[Path], None] | None
    """Collective: writes the adapter as it is now into a folder, as PEFT does; None: the method has none."""
    write_model: Callable[[Path], None] | None = None
    """Collective: writes the weights as they are now into a folder, as the hub has them; None: the method has an
    adapter."""


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """A named generator."""

    name: str
    open: Callable[[Any, GeneratorInputs], CompletionGenerator]
    """(params, inputs) -> the generator; collective. Raises MachineError: it cannot run here."""
    params: type[Params] = NoParams
    refuses: Callable[[Any, Any, Any], str] = _never
    """(params, `MethodSpec`, the method's params) -> why it cannot have what that method trains; "" where it can."""
    refuses_draws: Callable[[float, float], str] = _draws_all
    """(temperature, top_p) -> why it cannot say log-probabilities at that temperature before tokens are left out; ""
    where it can."""
    look: Callable[[Any, Any], str] | None = None
    """(params, `MethodSpec`) -> what of it there is to say before a run, for the doctor. Raises MachineError: it cannot
    be used."""
    on_this_machine: bool = True
    """It writes with the trained model beside the training: a plan counts its cache and its time."""
