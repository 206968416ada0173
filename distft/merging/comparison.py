"""Is the merged folder the model that it was made of: both read the same rows, and their predictions are compared.

On one side is the base with the adapter in PEFT's own layers, on the other the folder as transformers loads it, so that
neither the formulas nor the files of this room are on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distft.core.errors import DataError, NumericError
from distft.merging.base_model import BaseModel
from distft.model import quantize
from distft.model.adapters.peft_folder import with_adapter

MAX_KL = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}
"""Largest mean divergence (nats a token) by the type of the merged weights; see decision 91."""
MAX_TOKENS = 512
MAX_ROWS = 64
_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class MergeComparison:
    """How far the merged model is from the base with its adapter."""

    kl: float
    """KL(adapter || merged), mean over tokens, in nats. Of a reward model: of the preference between neighbouring rows,
    mean over rows."""
    largest_kl: float
    """Of one token."""
    agreement: float
    """Share of positions at which both predict the same token (of a reward model: prefer the same row)."""
    num_tokens: int
    num_rows: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return asdict(self)

    def require(self, max_kl: float, fix: str) -> None:
        """Refuse a merged model that is another one; `fix`: what rounds less.

        Raises:
            NumericError: the divergence is above `max_kl`, or not finite.
        """
        if not self.kl <= max_kl:  # also NaN
            raise NumericError(
                f"the merged model is not the adapter's: KL(adapter || merged) = {self.kl:.3g} nats a token over "
                f"{self.num_tokens} tokens, allowed {max_kl:.3g}; same greedy choice at {self.agreement:.1%}; no "
                f"folder was left  {fix}; --max-kl allows more"
            )


def compare(
    base: BaseModel, adapter: Path, merged: Path, rows: Sequence[Sequence[int]], dtype: torch.dtype
) -> MergeComparison:
    """Compare base and adapter with the merged folder on rows of token ids; both compute in `dtype`, one after another.

    Raises:
        DataError: there are no rows with two tokens.
        RecipeError: PEFT cannot put the adapter on the base.
    """
    cut = [list(row[:MAX_TOKENS]) for row in rows[:MAX_ROWS] if len(row) > 1]
    if not cut or (not base.head.generates and len(cut) < 2):
        raise DataError("no rows to compare the merged model on  --rows FILE, with texts of more than a token")
    rewards = not base.head.generates
    before = _predictions(with_adapter(base.filled(dtype), adapter), cut, rewards=rewards)
    loaded = base.head.auto_class(base.config).from_pretrained(merged, dtype=dtype, attn_implementation="sdpa")
    quantize.keep_layout(loaded)
    after = _predictions(loaded.eval(), cut, rewards=rewards)
    # With - p + q every class's part is at least zero, so that rounding does not make a small sum negative.
    kl = (before.exp() * (before - after) - before.exp() + after.exp()).sum(-1)
    same = before.argmax(-1) == after.argmax(-1)
    return MergeComparison(
        kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        agreement=float(same.double().mean()),
        num_tokens=kl.numel(),
        num_rows=len(cut),
        dtype=str(dtype).removeprefix("torch."),
    )


@torch.no_grad()
def _predictions(model: Any, rows: Sequence[list[int]], *, rewards: bool) -> Tensor:
    """Return log-probabilities [positions, classes] in fp64: of the next token, or of the better of two rows."""
    kept: list[Tensor] = []
    room = _KEPT_BYTES
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    for row in rows:
        logits = model(input_ids=torch.tensor([row], device=device)).logits[0].double()
        kept.append((logits if rewards else functional.log_softmax(logits, -1)).cpu())
        room -= kept[-1].numel() * 8
        if room < 0:
            break
    if not rewards:
        return torch.cat(kept)
    reward_N = torch.cat([values.flatten()[-1:] for values in kept])
    margin = reward_N[1:] - reward_N[:-1]
    return torch.stack([functional.logsigmoid(margin), functional.logsigmoid(-margin)], -1)
