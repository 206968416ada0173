"""The language modelling head: a distribution over the vocabulary at every position."""

from __future__ import annotations

from typing import Any

from distft.model.heads.spec import HeadSpec


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a config: a causal language model, or one that also reads images.

    The latter is trained on text alone; what only images pass through stays as it is.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mapped = type(config) in AutoModelForCausalLM._model_mapping
    both = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if both and not mapped else AutoModelForCausalLM


def _observe(lm: Any) -> Any:
    from distft.model import head

    return head.observe(lm)


def _output_layer(lm: Any) -> Any:
    return lm.get_output_embeddings()


SPEC = HeadSpec(
    name="lm",
    auto_class=auto_class,
    observe=_observe,
    output_layer=_output_layer,
    task_type="CAUSAL_LM",
    generates=True,
)
