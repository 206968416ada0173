"""The module that is trained: a transformers causal language model from token ids to per-token losses, or to answers.

T tokens of one micro-batch, S positions that the head looks at, E hidden size, V vocabulary; when answering B rows,
L new positions of each, K positions with those in the cache.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.types import IGNORE
from distft.model.adapters import token_rows
from distft.model.adapters.lora_head import use_loss_with_adapter
from distft.model.adapters.token_rows import use_loss_with_rows
from distft.model.adapters.virtual_tokens import PrefixInputs
from distft.model.cross_entropy import AtTemperature, ChunkLoss, HeadLoss, chunked_loss, judged, likelihoods
from distft.model.head import Observation
from distft.model.load_balancing import RouterLoss
from distft.model.logit_rule import LogitRule
from distft.model.paths import ForwardPath
from distft.model.token_accuracy import Counted, as_parts


class CausalLM(nn.Module):
    """Wraps `lm` so that one `forward` call runs the blocks, the head and the loss.

    One call, because engines gather and release parameters around forwards: the head must run inside the wrapped
    module's forward, and its weight may be touched only inside the head's own.
    """

    def __init__(
        self,
        lm: nn.Module,
        loss: HeadLoss,
        *,
        path: ForwardPath | None = None,
        observed: Observation | None = None,
        router: RouterLoss | None = None,
        value_head: nn.Linear | None = None,
        critic: nn.Module | None = None,
        penalty: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            lm: a transformers model, or one inside an adapter's wrapper.
            loss: what the head runs where the path says `chunked`.
            path: how numbers are computed; the fast path when None.
            observed: the model's trunk and its rule for logits; a `chunked` head needs it.
            router: the loss of a mixture of experts' router, where the config asks for one.
            value_head: gives a value for each position, from its last hidden state.
            critic: a trunk whose hidden states `value_head` reads instead of the model's own.
            penalty: what a method adds to the loss of every supervised token, of `lm`.
        """
        super().__init__()
        self.lm = lm
        self.path = path or ForwardPath()
        self.observed = observed
        self.router = router
        self.penalty = penalty
        self.prefix = PrefixInputs(lm)
        if self.path.head == "chunked" and observed is None:
            raise ValueError("a chunked head needs to know what the model does before its logits")
        self.critic = critic
        self.value_head = value_head  # beside the model, so that neither transformers nor an adapter's wrapper has it
        self.use_loss(loss)

    @property
    def transformer(self) -> Any:
        """The transformers model inside any adapter wrapper."""
        base = getattr(self.lm, "get_base_model", None)
        return base() if base is not None else self.lm

    @property
    def trunk(self) -> Any:
        """What gives the last hidden states."""
        assert self.observed is not None
        return self.transformer.get_submodule(self.observed.trunk)

    @property
    def pretrained(self) -> list[Any]:
        """Transformers' models that are trained, each with settings of its own: the policy's, and a critic's."""
        return [self.transformer, *([] if self.critic is None else [self.critic])]

    @property
    def head(self) -> Any:
        """The trained output projection (a copy of it under adapters' `modules_to_save`)."""
        head = self.transformer.get_output_embeddings()
        saved = getattr(head, "modules_to_save", None)
        return saved["default"] if saved is not None else head

    def use_loss(self, loss: HeadLoss) -> None:
        """Give the head a forward that, called with labels, returns this loss instead of logits.

        Under the path `own` the head is the model's own affair, and nothing changes.
        """
        self.head_loss = loss
        if self.path.head == "own":
            return
        head = self.head
        if not isinstance(head, nn.Linear):
            assert self.observed is not None
            of_head = use_loss_with_rows if token_rows.trains(head) else use_loss_with_adapter
            of_head(head, loss, self.observed.rule)
            return
        assert self.observed is not None
        rule = self.observed.rule
        product = types.MethodType(type(head).forward, head)

        def forward(
            self: nn.Linear, hidden: Tensor, labels: Tensor | None = None, head_loss: HeadLoss = loss
        ) -> Tensor:
            hidden = hidden.to(self.weight.dtype)  # Mamba's residuals are fp32, and its own forward converts here
            return product(hidden) if labels is None else head_loss(hidden, self.weight, self.bias, labels, rule)

        head.forward = types.MethodType(forward, head)

    def forward(self, *batch: Any, **inputs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run `losses`, `scores` or `answer`, whichever takes these inputs: engines gather around this one call."""
        if "ends_D" in inputs:
            return self.scores(**inputs)
        return self.answer(**inputs) if "input_ids_BL" in inputs else self.losses(*batch, **inputs)

    def losses(
        self,
        input_ids_T: Tensor,
        labels_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_supervised: int,
        per_token: bool = False,
        values: bool = False,
        loss: HeadLoss | None = None,
        accuracy: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of every supervised token, in order: fp32 [S], or [1] with their sum.

        Arguments are `Batch.inputs()`. `per_token`: [S] whatever that loss gives. `values`, with `per_token`: [2, S],
        the losses and the values of the positions before the labels. `loss`: what the head gives instead of the
        model's own loss; where the head is the model's own affair, it has to follow from logits. `accuracy`, in an
        evaluation: [n, 2], the parts of the loss and how many labels of each are the likeliest token.

        A micro-batch that supervises nothing returns a zero that depends on every parameter, because ranks must
        run the same collectives. With a router loss: (losses, router loss [1]), to be added; in
        training with a method's penalty: (losses, router loss [1], penalty [1]).
        """
        documents = self._documents(position_ids_T, cu_seqlens, max_seqlen)
        inputs = documents | self.prefix.of_ids(input_ids_T[None])
        if self.router is not None:
            inputs["output_router_logits"] = True
        self._forget_longer_documents()
        # The count is known on the host, so finding the positions needs no sync.
        at_S = torch.nonzero_static(labels_T != IGNORE, size=num_supervised).squeeze(1)
        nothing = num_supervised == 0
        if nothing:
            at_S = torch.zeros(1, dtype=torch.long, device=labels_T.device)
        labels_S = labels_T[at_S].clamp(min=0) if nothing else labels_T[at_S]
        if self.path.head == "own":
            output = self._own_forward(input_ids_T[None], inputs, at_S)
            logits_SV = output.logits[0].float()
            losses = (
                as_parts(judged(logits_SV, labels_S))
                if accuracy
                else _of_logits(loss or AtTemperature(), logits_SV, labels_S)
            )
        else:
            output = self.trunk(input_ids=input_ids_T[None], use_cache=False, **_taken(self.trunk, inputs))
            chosen = loss or (chunked_loss if per_token else None)
            plain = isinstance(self.head, nn.Linear)
            if accuracy:  # of a head under an adapter losses are made of a chunk's logits anyway
                chosen = Counted(self.head_loss) if plain else likelihoods
            hidden_SE = output.last_hidden_state[0][at_S]
            losses = self.head(hidden_SE, labels_S, *(() if chosen is None else (chosen,)))
            if accuracy and not plain:
                losses = as_parts(losses)
            if values:
                assert self.value_head is not None
                if self.critic is not None:
                    given = _taken(self.critic, documents)
                    read: Any = self.critic(input_ids=input_ids_T[None], use_cache=False, **given)
                    hidden_SE = read.last_hidden_state[0][at_S]
                value_S = self.value_head(hidden_SE.to(self.value_head.weight.dtype)).float().squeeze(1)
                losses = torch.stack([losses.float(), value_S])
        self.prefix.check()
        if nothing:
            losses = losses * 0.0
        router = None if self.router is None else self.router(output.router_logits, labels_T, cu_seqlens)
        if self.penalty is None or not self.training:
            return losses if router is None else (losses, router)
        penalty_1 = (num_supervised * self.penalty(self.lm)).reshape(1)
        return losses, torch.zeros_like(penalty_1) if router is None else router, penalty_1

    def scores(
        self, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, ends_D: Tensor
    ) -> Tensor:
        """Return fp32 [D], a scalar head's value at the positions `ends_D`: each document's last token.

        Arguments are `Batch.score_inputs()`.
        """
        inputs = self._documents(position_ids_T, cu_seqlens, max_seqlen)
        inputs |= self.prefix.of_ids(input_ids_T[None])
        self._forget_longer_documents()
        output = self.trunk(input_ids=input_ids_T[None], use_cache=False, **_taken(self.trunk, inputs))
        self.prefix.check()
        head = self.head
        return head(output.last_hidden_state[0][ends_D].to(head.weight.dtype)).float().squeeze(1)

    def _documents(self, position_ids_T: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
        """Return what tells the model where documents begin and end."""
        inputs: dict[str, Any] = {"position_ids": position_ids_T[None]}
        if self.path.documents == "packed":
            inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            inputs |= {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
        elif len(cu_seqlens) != 2:
            raise ValueError("this model trains on one document per forward")
        return inputs

    def answer(
        self,
        input_ids_BL: Tensor,
        attention_mask_BK: Tensor | None,
        position_ids_BL: Tensor,
        at_S: Tensor | None = None,
        cache: Any = None,
        labels_S: Tensor | None = None,
    ) -> Tensor:
        """Return fp32 logits [S, V] of what follows positions `at_S` of the flattened [B, L]; inside `answering`.

        Without `at_S`: of what follows each row, [B, V].

        With `labels_S`: [S, 2], the log-likelihood of each label there and whether it is the likeliest (1 or 0).
        `cache` holds the positions before these and takes these up.
        """
        inputs: dict[str, Any] = {"attention_mask": attention_mask_BK, "position_ids": position_ids_BL}
        if cache is not None:
            inputs |= {_cache_argument(self.trunk if self.path.head == "chunked" else self.transformer): cache}
        cached = 0 if cache is None else cache.get_seq_length()
        inputs |= self.prefix.of_rows(input_ids_BL, attention_mask_BK, cached)
        if cached == 0:
            self._forget_longer_documents()
        if self.path.head == "own":
            length = input_ids_BL.shape[1]
            if at_S is None:
                last_1 = torch.tensor([length - 1], device=input_ids_BL.device)
                output = self._own_forward(input_ids_BL, inputs, last_1, use_cache=cache is not None)
                logits_SV = output.logits[:, 0].float()
            else:
                columns_C, column_S = (at_S % length).unique(return_inverse=True)
                output = self._own_forward(input_ids_BL, inputs, columns_C, use_cache=cache is not None)
                logits_SV = output.logits[at_S // length, column_S].float()
            self.prefix.check()
            return logits_SV if labels_S is None else judged(logits_SV, labels_S)
        given = _taken(self.trunk, inputs)
        output = self.trunk(input_ids=input_ids_BL, use_cache=cache is not None, **given)
        self.prefix.check()
        hidden_BLE = output.last_hidden_state
        hidden_SE = hidden_BLE[:, -1].contiguous() if at_S is None else hidden_BLE.flatten(0, 1)[at_S]
        if labels_S is not None:
            return self.head(hidden_SE, labels_S, likelihoods)
        assert self.observed is not None
        rule = self.observed.rule
        return rule.finish(self.head(hidden_SE * rule.hidden_scale if rule.hidden_scale != 1.0 else hidden_SE).float())

    def _own_forward(
        self, input_ids_BL: Tensor, inputs: dict[str, Any], at_S: Tensor, *, use_cache: bool = False
    ) -> Any:
        """Run the model's own forward; the logits are those of positions `at_S` [S] of every row: [B, S, V]."""
        lm = self.transformer
        takes = _parameters(type(lm))
        if "logits_to_keep" in takes:
            return lm(input_ids=input_ids_BL, use_cache=use_cache, logits_to_keep=at_S, **_taken(lm, inputs))
        output = lm(input_ids=input_ids_BL, use_cache=use_cache, **_taken(lm, inputs))
        output.logits = output.logits[:, at_S]
        return output

    def _forget_longer_documents(self) -> None:
        """Forget the frequencies of the longest text so far, which dynamic NTK keeps.

        Source: transformers.modeling_rope_utils.dynamic_rope_update
        """
        for rope in self._dynamic_ropes:
            if rope.max_seq_len_cached > rope.original_max_seq_len:
                rope.max_seq_len_cached = rope.original_max_seq_len
                rope.register_buffer("inv_freq", rope.original_inv_freq.to(rope.inv_freq.device), persistent=False)

    @functools.cached_property
    def _dynamic_ropes(self) -> list[Any]:
        return [module for module in self.modules() if getattr(module, "rope_type", None) == "dynamic"]


@functools.cache
def _parameters(kind: type) -> dict[str, Any]:
    return dict(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _taken(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that the module's forward names, and, where it passes keywords on, the others.

    What a model does without (positions, borders of documents) it is not given; whether it is right without them is
    what `distft.model.proof` finds out.
    """
    names = _parameters(type(module))
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    return {
        name: value
        for name, value in inputs.items()
        if name in names or (open_ended and name not in ("position_ids", "attention_mask") and value is not None)
    }


def _cache_argument(module: Any) -> str:
    """Return the name by which the module's forward takes a cache."""
    return "cache_params" if "cache_params" in _parameters(type(module)) else "past_key_values"


def _of_logits(loss: HeadLoss, logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Return a loss of logits that the model has made by itself.

    Raises:
        MachineError: it needs the head's weight.
    """
    if not isinstance(loss, ChunkLoss):
        raise MachineError("this model's logits are its own affair: its last hidden states and its head cannot be had")
    return loss.of_chunk(LogitRule(temperature=loss.temperature).finish(logits_SV), labels_S, *loss.rows)
