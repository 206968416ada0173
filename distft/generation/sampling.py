"""The next token of each row: the likeliest, or drawn with numbers that belong to the row alone.

Shape letters: B rows, V vocabulary, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distft.generation.completion import seed_digest


def draws(names: Sequence[str], num_tokens: int, seed: int, device: torch.device) -> Tensor:
    """Return float64 [B, N] in [0, 1): each row's own numbers, whatever batch, rank or world it is answered in."""
    keys = (seed_digest(seed, name)[:16] for name in names)
    rows = [np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(num_tokens) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device)


def logprobs_of(logits_BV: Tensor, token_B: Tensor, temperature: float) -> list[float]:
    """Return the log-probability of each row's token at this temperature; 0 counts as 1."""
    scaled_BV = logits_BV.float() / temperature if temperature else logits_BV.float()
    return torch.log_softmax(scaled_BV, dim=1).gather(1, token_B[:, None]).squeeze(1).tolist()


def next_tokens(
    logits_BV: Tensor, draw_B: Tensor | None, temperature: float, top_p: float, *, logprobs: bool
) -> tuple[Tensor, Tensor | None]:
    """Return int64 [B] and fp64 [B]: tokens, and, if `logprobs`, theirs at the temperature (0 counts as 1).

    The token is the likeliest, of equals the first; with `draw_B` by inverting the distribution. Log-probabilities are
    those among all tokens.

    `top_p`: only the likeliest tokens that together have this probability are drawn from (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751).
    """
    if draw_B is None:
        token_B = logits_BV.argmax(1)
        if not logprobs:  # of a whole vocabulary for one token: most evaluations ask for none
            return token_B, None
        return token_B, torch.log_softmax(logits_BV.double(), dim=1).gather(1, token_B[:, None]).squeeze(1)
    scaled_BV = logits_BV if temperature == 1.0 else logits_BV.double() / temperature
    of_all_BV = p_BV = torch.softmax(scaled_BV, dim=1, dtype=torch.float64)
    order_BV = None
    if top_p < 1.0:
        p_BV, order_BV = p_BV.sort(dim=1, descending=True, stable=True)
        p_BV = torch.where(p_BV.cumsum(1) - p_BV < top_p, p_BV, 0.0)
    cumulative_BV = p_BV.cumsum(1)
    wanted_B1 = draw_B[:, None] * cumulative_BV[:, -1:]
    # The first token whose cumulative probability is above the draw: one of probability zero never is.
    token_B1 = torch.searchsorted(cumulative_BV, wanted_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    token_B1 = token_B1 if order_BV is None else order_BV.gather(1, token_B1)
    return token_B1.squeeze(1), of_all_BV.gather(1, token_B1).squeeze(1).log() if logprobs else None
