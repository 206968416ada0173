"""Which parameters text passes through, in a model that also reads images or sound."""

from __future__ import annotations

from typing import Any


def text_parameters(lm: Any) -> set[int]:
    """Return ids of the parameters that a forward of text alone can reach.

    All of a language model; of a wrapper its decoder and its output projection: what only images or sound pass through
    is left as it is, gets no adapter and no gradient.
    """
    config = lm.config
    if config.get_text_config(decoder=True) is config:
        return {id(param) for param in lm.parameters()}
    parts = (lm.get_decoder(), lm.get_output_embeddings(), lm.get_input_embeddings())
    return {id(param) for part in parts if part is not None for param in part.parameters()}


def other_modules(lm: Any) -> list[str]:
    """Return names of the modules with weights that no text passes through."""
    reached = text_parameters(lm)
    return [
        name
        for name, module in lm.named_modules()
        if name and any(id(param) not in reached for param in module._parameters.values() if param is not None)
    ]
