"""The model that is trained answers by itself, under the engine that trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.generation.spec import GeneratorInputs, GeneratorSpec

if TYPE_CHECKING:
    from distft.core.registry import NoParams
    from distft.generation.generator import Generator


def engine_generator(inputs: GeneratorInputs) -> Generator:
    """Return the generator over the engine's own weights, which also weighs given answers."""
    from distft.generation.generator import Generator

    given = {"decode": inputs.decode, "stop_ids": inputs.stop_ids, "stop": inputs.stop}
    return Generator(inputs.engine, inputs.module, **given)


def _open(params: NoParams, inputs: GeneratorInputs) -> Generator:
    return engine_generator(inputs)


SPEC = GeneratorSpec(name="engine", open=_open)
