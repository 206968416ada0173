"""Prompts as tokens go in; completions or log-likelihoods come out, the same under every engine.

One file per generator, one line here.
"""

from distft.core.registry import Registry
from distft.generation import engine_generator, vllm_generator
from distft.generation.spec import CompletionGenerator, GeneratorInputs, GeneratorSpec

GENERATORS: Registry[GeneratorSpec] = Registry("generator")
GENERATORS.add(engine_generator.SPEC)
GENERATORS.add(vllm_generator.SPEC)

__all__ = ["GENERATORS", "CompletionGenerator", "GeneratorInputs", "GeneratorSpec"]
