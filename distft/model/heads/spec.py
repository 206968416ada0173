"""What a head declares about itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams, Params

if TYPE_CHECKING:
    import torch

    from distft.model.head import Observation
    from distft.model.paths import ForwardPath


def _unchanged(config: Any) -> Any:
    return config


def _nothing(config: Any) -> frozenset[str]:
    return frozenset()


def _no_change(config: Any, pad_id: int | None) -> None:
    """Leave the config as it is."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A named head; an objective says which it trains (`ObjectiveSpec.head`)."""

    name: str
    auto_class: Callable[[Any], Any]
    """Config -> transformers' auto class that builds the model with this head.

    Raises:
        RecipeError: transformers has no such model for the architecture.
    """
    observe: Callable[[Any], Observation | None]
    """Transformers' model on the meta device -> its trunk and what it does between trunk and output."""
    output_layer: Callable[[Any], Any]
    """Transformers' model -> the layer from hidden states to outputs. Raises RecipeError: it has none."""
    task_type: str
    """PEFT's name of the task, which decides how an adapter is loaded."""
    params: type[Params] = NoParams
    prepare: Callable[[Any], Any] = _unchanged
    """Config of the base -> config of the model with this head. Raises RecipeError: the folder has another head."""
    fresh: tuple[str, ...] = ()
    """Names of parameters that start at random where the weights' files do not hold them."""
    surplus: Callable[[Any], frozenset[str]] = _nothing
    """Config -> names of tensors that files may hold and this model has no place for."""
    trained_whole: tuple[str, ...] = ()
    """Modules that adapter methods train beside the adapter."""
    generates: bool = False
    """The model can answer prompts."""
    values: bool = False
    """Beside it stands a layer that gives a value for each position (`CausalLM.value_head`), which starts at zero, is
    trained whole under every method, and is left in checkpoints: `final/` is the model without it."""
    critic: bool = False
    """That layer reads the hidden states of a second trunk (`CausalLM.critic`), which starts as the model's own does
    and is trained whole too."""
    hold: Callable[[Any, ForwardPath, torch.device, int], None] | None = None
    """(config, path that is right for the language model, device, max_length): compares outputs and gradients under
    that path with transformers' own. Raises NotEqualError: says what differs. None: the model's own proof is enough."""
    finish_config: Callable[[Any, int | None], None] = _no_change
    """(config that is exported, a token that no row ends with or None): what other programs need to read there."""


def put_head(lm: Any, head: HeadSpec) -> None:
    """Let transformers' model know its head.

    Where it is no language modelling head, `get_output_embeddings` gives it all the same: PEFT, the 4-bit storage and
    the engines ask there which layer is the head, which is neither adapted nor quantised.

    Raises:
        RecipeError: the model has no such layer.
    """
    if not head.generates:
        head.output_layer(lm)
        lm.get_output_embeddings = functools.partial(head.output_layer, lm)
    lm.distft_head = head


def head_of(lm: Any) -> HeadSpec | None:
    """Return what `put_head` put there."""
    return getattr(lm, "distft_head", None)
