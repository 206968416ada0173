"""The module that is trained: a transformers causal language model from token ids to per-token losses, or to answers.

T tokens of one micro-batch, S positions that the head looks at, E hidden size, V vocabulary; when answering B rows,
L new positions of each, K positions with those in the cache.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.types import IGNORE
from distft.model.cross_entropy import HeadLoss, likelihoods, with_adapter


class CausalLM(nn.Module):
    """Wraps `lm` so that one `forward` call runs the blocks, the head and the loss.

    One call, because engines gather and release parameters around forwards: the head must run inside the wrapped
    module's forward, and its weight may be touched only inside the head's own.
    """

    def __init__(self, lm: nn.Module, loss: HeadLoss) -> None:
        super().__init__()
        self.lm = lm
        self.use_loss(loss)

    @property
    def transformer(self) -> Any:
        """The transformers model inside any adapter wrapper."""
        base = getattr(self.lm, "get_base_model", None)
        return base() if base is not None else self.lm

    @property
    def head(self) -> nn.Linear:
        """The trained output projection (a copy of it under adapters' `modules_to_save`)."""
        head = self.transformer.get_output_embeddings()
        saved = getattr(head, "modules_to_save", None)
        return saved["default"] if saved is not None else head

    def use_loss(self, loss: HeadLoss) -> None:
        """Give the head a forward that, called with labels, returns this loss instead of logits."""
        head = self.head
        if not isinstance(head, nn.Linear):
            _use_loss_with_adapter(head, loss)
            return
        logits = types.MethodType(type(head).forward, head)

        def forward(self: nn.Linear, hidden: Tensor, labels: Tensor | None = None, said: HeadLoss = loss) -> Tensor:
            return logits(hidden) if labels is None else said(hidden, self.weight, self.bias, labels)

        head.forward = types.MethodType(forward, head)

    def forward(self, *batch: Any, **inputs: Any) -> Tensor:
        """`losses`, or `answer` when the inputs are rows: one door for both, because engines gather around it."""
        return self.answer(**inputs) if "input_ids_BL" in inputs else self.losses(*batch, **inputs)

    def losses(
        self,
        input_ids_T: Tensor,
        labels_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_supervised: int,
    ) -> Tensor:
        """Loss of every supervised token, in order: fp32 [S], or [1] with their sum, as the head's loss gives them.

        Arguments are `Batch.inputs()`.

        A micro-batch that supervises nothing returns a zero that depends on every parameter, because ranks must
        run the same collectives.
        """
        hidden_TE = self.transformer.base_model(
            input_ids=input_ids_T[None],
            position_ids=position_ids_T[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
        ).last_hidden_state[0]
        if num_supervised == 0:
            return self.head(hidden_TE[:1], labels_T[:1].clamp(min=0)) * 0.0
        # The count is known on the host, so finding the positions needs no sync.
        at_S = torch.nonzero_static(labels_T != IGNORE, size=num_supervised).squeeze(1)
        return self.head(hidden_TE[at_S], labels_T[at_S])

    def answer(
        self,
        input_ids_BL: Tensor,
        attention_mask_BK: Tensor | None,
        position_ids_BL: Tensor,
        at_S: Tensor,
        cache: Any = None,
        labels_S: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits [S, V] of what follows positions `at_S` of the flattened [B, L]; call it inside `answering`.

        With `labels_S`: [S, 2], the log-likelihood of each label there and whether it is the likeliest (1 or 0).
        `cache` holds the positions before these and takes these up.
        """
        hidden_BLE = self.transformer.base_model(
            input_ids=input_ids_BL,
            attention_mask=attention_mask_BK,
            position_ids=position_ids_BL,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        hidden_SE = hidden_BLE.flatten(0, 1)[at_S]
        return self.head(hidden_SE).float() if labels_S is None else self.head(hidden_SE, labels_S, likelihoods)


def _use_loss_with_adapter(head: Any, loss: HeadLoss) -> None:
    """The same for a head under PEFT's LoRA.

    Each of its parts is called once, however many chunks the loss has: engines that gather parameters around a part's
    forward run a collective for every call, and ranks have different numbers of chunks. So the loss runs inside the
    forward of the base layer, which runs inside that of `lora_B`: there both weights may be touched.
    """
    base = getattr(head, "base_layer", head)
    if not isinstance(base, nn.Linear) or list(getattr(head, "lora_A", ())) != ["default"] or head.use_dora["default"]:
        raise TypeError(f"the output projection is {type(head).__name__}, neither a linear layer nor one under LoRA")
    down, up, dropout = head.lora_A["default"], head.lora_B["default"], head.lora_dropout["default"]
    own, own_base, own_up = (types.MethodType(type(part).forward, part) for part in (head, base, up))

    def base_forward(self: nn.Linear, hidden: Tensor, inner: Any = None, up_VR: Any = None, *labelled: Any) -> Tensor:
        if inner is None:
            return own_base(hidden)
        labels, said = labelled
        return with_adapter(said, hidden, inner, self.weight, self.bias, up_VR, labels)

    def up_forward(self: nn.Linear, inner: Tensor, hidden: Any = None, *labelled: Any) -> Tensor:
        return own_up(inner) if hidden is None else base(hidden, inner, self.weight, *labelled)

    def forward(self: Any, hidden: Tensor, labels: Tensor | None = None, said: HeadLoss = loss) -> Tensor:
        if labels is None:
            return own(hidden)
        inner = down(dropout(hidden.to(down.weight.dtype))) * self.scaling["default"]
        return up(inner, hidden, labels, said)

    for part, its in ((base, base_forward), (up, up_forward), (head, forward)):
        part.forward = types.MethodType(its, part)
