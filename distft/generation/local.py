"""What generating needs of an engine, for a model that lies in this process alone: `distft chat`, routers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distft.generation.generator import Generator
from distft.generation.grammar import TokenConstraint


class LocalEngine:
    """Stands for an engine of one process around a module that is there already."""

    rank, world, collective_forward = 0, 1, False

    def __init__(self, module: Any) -> None:
        self.inference_module = module
        self.device = next(module.parameters()).device

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients are recorded inside."""
        with torch.no_grad():
            yield

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Return the values: there is one rank."""
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of the one rank."""
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""


def local_generator(
    lm: Any,
    tokenizer: Any,
    stop_ids: Sequence[int],
    *,
    stop: Callable[[], bool] = lambda: False,
    heard: Callable[[int, int], None] | None = None,
    constrain: Callable[[int], TokenConstraint] | None = None,
) -> Generator:
    """Return a generator over transformers' model, or PEFT's, with its own forward and attention."""
    from distft.model.causal import CausalLM
    from distft.model.cross_entropy import chunked_loss
    from distft.model.paths import ForwardPath

    path = ForwardPath(head="own", attention="sdpa", documents="single")
    module = CausalLM(lm, chunked_loss, path=path).eval()
    engine: Any = LocalEngine(module)
    return Generator(
        engine,
        module,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        stop_ids=stop_ids,
        stop=stop,
        heard=heard,
        constrain=constrain,
    )
