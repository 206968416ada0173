"""EVA: LoRA's A as the directions in which the inputs of a layer vary most over the training rows; B is zero.

The search is PEFT's (`get_eva_state_dict`: an incremental SVD of each layer's inputs, batch by batch, until directions
stay). Here is what it looks at, and how ranks and matrices that were found reach the model.

A [R, I]: R orthonormal rows over I inputs; T tokens of a batch, of which N are looked at.
Source: https://arxiv.org/abs/2410.07170; peft/tuners/lora/eva.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.batch import IGNORE, Batch
from distft.core.errors import MachineError, Problem, RecipeError
from distft.model.adapters import lora
from distft.model.adapters.lora_params import EvaParams, LoraParams, without_rows
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_BATCHES = 1000
"""Forwards after which directions that still turn are given up."""


def least_tokens(layers: dict[str, Any], params: LoraParams) -> int:
    """Return how many tokens a batch needs: twice as many as directions are looked for (`torch.svd_lowrank`)."""
    return 2 * max(_most(layer, params) for layer in layers.values())


def _settings(params: LoraParams) -> EvaParams:
    return params.eva or EvaParams()


def _most(layer: Any, params: LoraParams) -> int:
    return round(layer.r[lora.ADAPTER] * _settings(params).rho)


def layers_of(lm: nn.Module, params: LoraParams) -> dict[str, Any]:
    """Return the layers that have an adapter, by their names in `lm`.

    Args:
        lm: with LoRA attached.
        params: of the recipe.

    Raises:
        RecipeError: one of them is no linear layer, is the head, or is too narrow for the rank.
    """
    from peft.tuners.lora.layer import LoraLayer
    from torch import nn

    layers: dict[str, Any] = {name: part for name, part in lm.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        plain = lora.base_name(name)
        fix = "leave it out of target_modules"
        message = ""
        if not isinstance(layer.get_base_layer(), nn.Linear):
            message = f"{plain} is no linear layer, whose inputs could be looked at"
        elif plain.endswith("lm_head"):
            message = "the head does not see every token"
        elif 2 * _most(layer, params) > layer.in_features:
            message = (
                f"{plain} has {layer.in_features} inputs, and r x rho = {_most(layer, params)} takes twice as many"
            )
            fix = f"r x rho of {layer.in_features // 2} or less"
        if message:
            raise RecipeError("recipe", [Problem(message=f'[method] init = "eva": {message}', fix=fix)])
    return layers


def wants_trained(params: LoraParams) -> bool:
    """Return whether inputs of trained tokens alone are looked at."""
    return _settings(params).tokens == "trained"


def chosen_T(batch: Batch, params: LoraParams) -> Tensor:
    """Return int64 [N], the positions whose inputs are looked at: of trained tokens themselves (as PEFT's label mask,
    whose labels are not shifted), or of all.
    """  # noqa: D205
    import torch

    if not wants_trained(params):
        return torch.arange(batch.num_tokens)
    return torch.nonzero(batch.labels_T != IGNORE).flatten() + 1  # a label never crosses a document's border


def found(
    module: nn.Module,
    layers: dict[str, Any],
    prefix: str,
    params: LoraParams,
    batches: Sequence[Batch],
    forward: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return A of each layer, fp32 on the CPU, by the layer's name in the base; no rows where it gets no adapter.

    Args:
        module: what is computed with; names of layers below it begin with `prefix`.
        layers: see `layers_of`.
        prefix: name of the model with LoRA in `module`, with a dot.
        params: of the recipe.
        batches: which have `least_tokens`, in the order in which they are looked at, again and again.
        forward: computes a batch of this index, without gradients.

    Raises:
        MachineError: directions still turn after `MOST_BATCHES`, or a layer does not see every token.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    settings, number = _settings(params), _Count()
    names = {f"{prefix}{name}.base_layer": lora.base_name(name) for name in layers}
    ranks = {full: layer.r[lora.ADAPTER] for full, layer in zip(names, layers.values(), strict=True)}
    config = LoraConfig(
        r=params.r,
        target_modules=list(names),
        rank_pattern={full: rank for full, rank in ranks.items() if rank != params.r},
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=settings.rho, tau=settings.tau),
    )

    def run(_: Any, inputs: dict[str, Tensor]) -> None:
        number.forwards += 1
        forward(int(inputs["index"]))

    def positions(inputs: dict[str, Tensor], _: Any) -> Tensor:
        number.tokens = batches[int(inputs["index"])].input_ids_T.numel()
        return chosen_T(batches[int(inputs["index"])], params)

    def looked_at(given: Any, positions_N: Tensor, name: str) -> Tensor:
        x_TI: Tensor = (given[0] if isinstance(given, tuple | list) else given).detach()
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        if len(x_TI) != number.tokens:
            raise MachineError(
                f'[method] init = "eva": {names[name]} gets {len(x_TI)} of {number.tokens} tokens: leave it out of '
                "target_modules"
            )
        x_NI = x_TI[positions_N.to(x_TI.device)]
        if number.forwards > 1:
            return x_NI
        # PEFT's first forward finds layers with equal inputs, by a hash of a tuple of all numbers: of 32 here.
        content = x_NI.float().cpu().contiguous().numpy().tobytes()
        return torch.tensor(list(hashlib.sha256(content).digest()))

    rows = get_eva_state_dict(
        module,
        _Again(len(batches)),
        peft_config=config,
        forward_fn=run,
        prepare_model_inputs_fn=positions,
        prepare_layer_inputs_fn=looked_at,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    return {names[full]: a_RI.float().cpu().contiguous().clone() for full, a_RI in rows.items()}


class _Count:
    """Where PEFT's loop is."""

    forwards = 0
    tokens = 0
    """Positions of the batch that is computed."""


class _Again:
    """What PEFT takes for a data loader: the indices of batches, again and again."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        import torch

        for turn in range(MOST_BATCHES):
            yield {"index": torch.tensor(turn % self._count)}
        raise MachineError(
            f'[method] init = "eva": directions still turn after {MOST_BATCHES} batches: set [method] eva.tau lower'
        )


def started(method: MethodSpec, params: LoraParams, file: Path) -> MethodSpec:
    """Return `method` with the ranks that were found, and A filled from `file`.

    Args:
        method: lora or qlora.
        params: of the recipe.
        file: safetensors of A by the names of layers in the base.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        rank_of = {name: stored.get_slice(name).get_shape()[0] for name in stored.keys()}  # noqa: SIM118

    def attach(lm: Any, given: LoraParams, dtype: torch.dtype) -> nn.Module:
        return method.attach(lm, _with_ranks(given, rank_of), dtype)

    def fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
        if ".lora_A." not in name:
            assert method.fresh is not None
            return method.fresh(name, model, meta, generator)
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(lora.base_name(name.partition(".lora_A.")[0]))

    return replace(method, attach=attach, fresh=fresh)


def _with_ranks(params: LoraParams, rank_of: dict[str, int]) -> LoraParams:
    """Return the settings with these ranks; the scale grows with the rank, as in PEFT, if `adjust_scaling` says so.

    Source: peft/tuners/lora/eva.py (`_load_eva_state_dict`)
    """
    plain = without_rows(params)
    if _settings(params).rho == 1:
        return plain
    ranks, alphas = dict[str, int](), dict[str, float]()
    for name, rank in rank_of.items():
        before = _of_pattern(params.rank_pattern, name, params.r)
        alpha = _of_pattern(params.alpha_pattern, name, params.alpha)
        if rank != before and _settings(params).adjust_scaling:
            alpha *= rank / before
        if rank and rank != params.r:
            ranks[name] = rank
        if rank and alpha != params.alpha:
            alphas[name] = alpha
    changes = {"rank_pattern": ranks, "alpha_pattern": alphas, "layers_to_transform": (),
               "target_modules": tuple(name for name, rank in rank_of.items() if rank)}  # fmt: skip
    return plain.model_copy(update=changes)


def _of_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default)
