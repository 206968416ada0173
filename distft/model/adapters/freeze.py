"""Parts of the model are trained whole, the rest is left as it is: last blocks, biases, norms, or what patterns fit.

Sources: https://arxiv.org/abs/1911.03090 (last layers), https://arxiv.org/abs/2106.10199 (biases),
https://arxiv.org/abs/2312.11420 (norms)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params, nearest
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


class FreezeParams(Params):
    """What is trained: all that one of the keys names."""

    last_blocks: int = Field(default=0, ge=0)
    """Blocks at the end of the model."""
    parameters: tuple[str, ...] = ()
    """Regular expressions that fit whole names of parameters, such as '.*\\.mlp\\..*'."""
    biases: bool = False
    """Every bias."""
    norms: bool = False
    """Every parameter of a norm."""

    @field_validator("parameters")
    @classmethod
    def _expressions(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f'"{pattern}" is no regular expression: {error}') from None
        return patterns

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if not (self.last_blocks or self.parameters or self.biases or self.norms):
            raise ValueError("nothing is trained: set last_blocks, parameters, biases or norms")
        return self


def _attach(lm: Any, params: FreezeParams, dtype: torch.dtype) -> nn.Module:
    from distft.model.blocks import blocks_of

    lm.requires_grad_(False)
    blocks = blocks_of(lm)
    if params.last_blocks > len(blocks):
        raise _mistake(f"last_blocks = {params.last_blocks}: the model has {len(blocks)} blocks", "")
    for block in blocks[len(blocks) - params.last_blocks :]:
        block.requires_grad_(True)
    named = dict(lm.named_parameters())
    for pattern in params.parameters:
        meant = [param for name, param in named.items() if re.fullmatch(pattern, name)]
        if not meant:
            raise _mistake(f'parameters: "{pattern}" fits no parameter of the model', _hint(pattern, list(named)))
        for param in meant:
            param.requires_grad_(True)
    if params.biases:
        biases = [param for name, param in named.items() if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise _mistake("biases = true: the model has no biases", "train its norms, or its last blocks")
        for param in biases:
            param.requires_grad_(True)
    if params.norms:
        norms = [module for module in lm.modules() if "norm" in type(module).__name__.lower()]
        if not norms:
            raise _mistake("norms = true: the model has no norms", "train its biases, or its last blocks")
        for norm in norms:
            norm.requires_grad_(True)
    return lm


def _hint(pattern: str, names: list[str]) -> str:
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    bare = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern).strip(".")
    near = nearest(bare, [*ends, *names])
    tail = f"did you mean '.*{near}'?" if near else f"the model has {', '.join(ends[:8])}, ..."
    return f"it must fit a whole name; {tail}"


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[method] {message}", fix=fix)])


def _owns(name: str) -> bool:
    return False


def _blocks_differ(params: FreezeParams) -> bool:
    return bool(params.last_blocks) or any(re.search(r"\d", pattern) for pattern in params.parameters)


SPEC = MethodSpec(
    name="freeze",
    title="Partial fine-tuning",
    params=FreezeParams,
    attach=_attach,
    owns=_owns,
    blocks_differ=_blocks_differ,
)
