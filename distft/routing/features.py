"""What is known of a request before any adapter is chosen: the frozen base's hidden state, and Arrow's similarities.

Shape letters: L positions, D width of the model, I inputs of a layer, R rank, N adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distft.model.adapters.pool import AdapterPool


@torch.no_grad()
def request_features(
    pool: AdapterPool, requests: Sequence[Sequence[int]], *, layers: Sequence[float], pooling: Literal["mean", "last"]
) -> Tensor:
    """Return the base's pooled hidden states of each request, fp32 [requests, layers, D].

    Args:
        pool: base and adapters; only the base computes.
        requests: token ids.
        layers: depths, as shares of the layers.
        pooling: mean over the tokens, or the last one.
    """
    found = []
    with pool.using(None) as model:
        core = model.get_base_model()
        device = next(model.parameters()).device
        for ids in requests:
            states = core(input_ids=torch.tensor([list(ids)], device=device), output_hidden_states=True).hidden_states
            chosen = [states[round(layer * (len(states) - 1))][0].float() for layer in layers]
            found.append(torch.stack([state.mean(0) if pooling == "mean" else state[-1] for state in chosen]).cpu())
    return torch.stack(found)


@torch.no_grad()
def token_features(
    pool: AdapterPool,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    layers: Sequence[float],
    pooling: Literal["mean", "last"],
) -> Tensor:
    """Return the base's hidden states at positions of rows, pooled over all up to there, fp32 [positions, layers, D].

    Args:
        pool: base and adapters; only the base computes.
        rows: (token ids, positions) of each.
        layers: depths, as shares of the layers.
        pooling: mean over the tokens up to the position, or the position alone.
    """
    found = []
    with pool.using(None) as model:
        core = model.get_base_model()
        device = next(model.parameters()).device
        for ids, positions in rows:
            states = core(input_ids=torch.tensor([list(ids)], device=device), output_hidden_states=True).hidden_states
            chosen_L = torch.tensor(list(positions), device=device)
            at_layers = [pooled(states[round(layer * (len(states) - 1))][0].float(), pooling) for layer in layers]
            found.append(torch.stack([state_LD[chosen_L] for state_LD in at_layers], 1).cpu())
    return torch.cat(found)


def pooled(
    state_LD: Tensor, pooling: Literal["mean", "last"], before_D: Tensor | None = None, count: int = 0
) -> Tensor:
    """Return the features at each position [L, D]: its state, or the mean of the states up to it.

    Args:
        state_LD: hidden states.
        pooling: which of the two.
        before_D: sum of the states of `count` positions before these.
        count: how many.
    """
    if pooling == "last":
        return state_LD
    sum_LD = state_LD.cumsum(0) if before_D is None else state_LD.cumsum(0) + before_D
    return sum_LD / torch.arange(count + 1, count + len(state_LD) + 1, device=state_LD.device)[:, None]


def arrow_prototypes(pool: AdapterPool) -> dict[str, dict[str, Tensor]]:
    """Return for each adapter the input direction that it changes most, fp32 [I] of length one for each layer.

    It is the first right singular vector of B A, found from the factors' small product.

    Source: Ostapenko et al., Towards Modular LLMs by Building and Routing Libraries of LoRAs (2024), Arrow.
    """
    made: dict[str, dict[str, Tensor]] = {name: {} for name in pool.names}
    for path, layer in pool.layers():
        for name in pool.names:
            if name not in layer.lora_A:
                continue
            down_RI, up_OR = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
            basis_IR, small_RR = torch.linalg.qr(down_RI.T)
            product_RR = torch.linalg.qr(up_OR).R @ small_RR.T
            right_RR = torch.linalg.svd(product_RR).Vh
            made[name][path] = (basis_IR @ right_RR[0]).cpu()
    return made


@torch.no_grad()
def arrow_similarities(
    pool: AdapterPool, prototypes: Mapping[str, Mapping[str, Tensor]], requests: Sequence[Sequence[int]]
) -> Tensor:
    """Return for each request how far each adapter's directions are its own: mean |cosine|, fp32 [requests, N]."""
    names, rows = list(prototypes), []
    with pool.using(None) as model:
        device = next(model.parameters()).device
        for ids in requests:
            inputs: dict[str, Tensor] = {}
            with _listening(pool, inputs):
                model(input_ids=torch.tensor([list(ids)], device=device))
            rows.append(torch.tensor([_similarity(prototypes[name], inputs) for name in names]))
    return torch.stack(rows)


def _similarity(directions: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> float:
    cosines = [
        torch.nn.functional.normalize(inputs[path], dim=-1) @ direction for path, direction in directions.items()
    ]
    return float(torch.stack([cosine_L.abs().mean() for cosine_L in cosines]).mean())


@contextmanager
def _listening(pool: AdapterPool, inputs: dict[str, Tensor]) -> Iterator[None]:
    def keep(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0][0].float().cpu()

        return hook

    handles = [layer.register_forward_pre_hook(keep(path)) for path, layer in pool.layers()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
