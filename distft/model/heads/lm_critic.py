"""The language modelling head beside a critic that is a model of its own: a second trunk of the same config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError, Problem, RecipeError
from distft.model.heads import lm_value

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distft.model.causal import CausalLM

SPEC = replace(lm_value.SPEC, name="lm_critic", critic=True)


def build(
    config: Any, dtype: torch.dtype, kernel: str, trunk: str, *, router_loss: bool
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the critic's trunk without values, all of it trained, and its blocks.

    Call it where parameters are made on the meta device. `trunk`: its name inside transformers' model, and so the
    prefix of its parameters' names in the base's files, which it starts from. `router_loss`: the policy has one.

    Raises:
        RecipeError: the model is a mixture of experts with a loss of its router, or reads more than text.
        MachineError: it has blocks outside of its trunk.
    """
    from distft.model.blocks import blocks_of
    from distft.model.towers import text_parameters

    if router_loss:
        raise _refused("its config asks for a loss of the router", "set output_router_logits to false in config.json")
    lm = SPEC.auto_class(config).from_config(config, dtype=dtype, attn_implementation=kernel)
    critic = lm.get_submodule(trunk)
    reached = text_parameters(lm)
    if any(id(param) not in reached for param in critic.parameters()):
        raise _refused("it also reads what is not text", "take a text model")
    if not hasattr(critic, "gradient_checkpointing_enable"):
        raise _refused(f"transformers has no model of its {type(critic).__name__} alone", "take another model")
    blocks, inside = blocks_of(lm), {id(module) for module in critic.modules()}
    if any(id(block) not in inside for block in blocks):
        raise MachineError(
            f"{type(lm).__name__} has blocks outside of {trunk}, which a critic of its own would leave out"
        )
    return critic.requires_grad_(True), blocks


def base_names(module: CausalLM) -> Iterator[tuple[int, str]]:
    """Yield id and name in the base's files of each module of the critic."""
    assert module.critic is not None
    assert module.observed is not None
    for name, part in module.critic.named_modules():
        yield id(part), f"{module.observed.trunk}.{name}".removesuffix(".")


def _refused(why: str, fix: str) -> RecipeError:
    message = f"the critic of its own is a second model of the same config, and {why}"
    return RecipeError("recipe", [Problem(message=message, fix=f'{fix}, or [objective] critic = "trunk"')])
