"""The language-model head and its loss, without logits of [tokens, vocabulary] in fp32.

S supervised tokens, C tokens of one chunk, E hidden size, V vocabulary.

Only supervised positions reach the head: with a masked prompt most of the head's work is never done.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distft.core.errors import MachineError
from distft.core.optional import why_not
from distft.model.logit_rule import PLAIN, LogitRule

CHUNK_BYTES = 256 * 2**20
"""Largest fp32 logits block that exists at once: 512 tokens of a vocabulary of 128 k. An estimate, not measured."""
TILE = 128
"""Rows of a matrix product's tile on GPUs; a chunk that ends within one wastes the rest of it."""


HeadLoss = Callable[[Tensor, Tensor, "Tensor | None", Tensor, LogitRule], Tensor]
"""(hidden_SE, weight_VE, bias_V, labels_S, rule) -> fp32 losses per token [S], or [1] with their sum."""


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens' fp32 logits fit CHUNK_BYTES: whole tiles, where that is more than one."""
    tokens = max(1, CHUNK_BYTES // (4 * vocabulary))
    return tokens - tokens % TILE if tokens > TILE else tokens


def choose(name: str, device: torch.device, *, per_token: bool = False) -> HeadLoss:
    """Choose the loss for a recipe's `cross_entropy`: fused on a GPU with Liger, else chunked.

    `per_token`: the objective needs each token's loss, which neither the fused kernel nor `chunked_sum` give.

    Raises:
        MachineError: the fused kernel was asked for and cannot run.
    """
    if name == "fused" and per_token:
        raise MachineError('cross_entropy = "fused" gives only sums, and this objective needs every token\'s loss')
    missing = "" if device.type == "cuda" else "it needs a CUDA device"
    missing = missing or ("" if per_token and name != "fused" else why_not("liger_kernel.transformers.functional"))
    if name == "fused" and missing:
        raise MachineError(
            f'cross_entropy = "fused" cannot run here: {missing}; "auto" takes the chunked loss where that is so'
        )
    if name in ("fused", "auto") and not missing and not per_token:
        return fused_loss
    if name == "full":
        return full_loss
    return chunked_loss if per_token else chunked_sum


def full_loss(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Compute the loss of all logits at once: the plain reference."""
    return F.cross_entropy(rule.logits(hidden_SE, weight_VE, bias_V), labels_S, reduction="none")


def chunked_loss(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Compute the loss in chunks of at most CHUNK_BYTES of logits, recomputed in the backward pass.

    Costs one more head matmul (2·S·V·E FLOPs) and saves 12·S·V bytes.
    """
    size = chunk_tokens(weight_VE.shape[0])
    if len(labels_S) <= size:
        return full_loss(hidden_SE, weight_VE, bias_V, labels_S, rule)
    return _chunked(functools.partial(_full, rule), size, hidden_SE, labels_S, shared=(weight_VE, bias_V))


class ChunkLoss(ABC):
    """A `HeadLoss` that follows from the logits of a chunk of tokens, recomputed in the backward pass."""

    temperature: float = 1.0
    """What logits are divided by."""
    rows: tuple[Tensor, ...] = ()
    """Further inputs, each [S, ...], which are cut into chunks with the tokens."""

    @abstractmethod
    def of_chunk(self, logits_CV: Tensor, labels_C: Tensor, *rows: Tensor) -> Tensor:
        """Return fp32 [C], or [C, n], of each token."""

    def of(self, rule: LogitRule) -> LogitRule:
        """Return the model's rule with the temperature."""
        return replace(rule, temperature=self.temperature)

    def __call__(
        self, hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
    ) -> Tensor:
        """Compute the loss in chunks of at most CHUNK_BYTES of logits."""
        rule = self.of(rule)

        def losses(hidden_CE: Tensor, labels_C: Tensor, *given: Tensor) -> Tensor:
            *rows, weight, bias = given
            return self.of_chunk(rule.logits(hidden_CE, weight, bias), labels_C, *rows)

        size = chunk_tokens(weight_VE.shape[0])
        if len(labels_S) <= size:
            return losses(hidden_SE, labels_S, *self.rows, weight_VE, bias_V)  # type: ignore[arg-type]
        return _chunked(losses, size, hidden_SE, labels_S, *self.rows, shared=(weight_VE, bias_V))


@dataclass(frozen=True, kw_only=True)
class AtTemperature(ChunkLoss):
    """The cross-entropy of the distribution that answers are drawn from at a temperature."""

    temperature: float = 1.0

    def of_chunk(self, logits_CV: Tensor, labels_C: Tensor, *rows: Tensor) -> Tensor:
        """Return it of each token."""
        return F.cross_entropy(logits_CV, labels_C, reduction="none")


def _full(rule: LogitRule, hidden_CE: Tensor, labels_C: Tensor, weight_VE: Tensor, bias_V: Tensor | None) -> Tensor:
    return full_loss(hidden_CE, weight_VE, bias_V, labels_C, rule)


def _chunked(losses: Callable[..., Tensor], size: int, *rows: Tensor, shared: tuple[Tensor | None, ...]) -> Tensor:
    """Compute losses(*chunk, *shared) for each `size` of the rows, recomputed in the backward pass."""
    return _Chunked.apply(losses, size, len(rows), *rows, *shared)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """Chunks one after another, as torch.utils.checkpoint runs them, but for the gradients of what all chunks share.

    Those are added in fp32. Autograd would add a bf16 weight's in bf16, where each sum loses what is below its last
    bit: of 32 chunks 0.7 %.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, losses: Callable[..., Tensor], size: int, num_rows: int, *inputs: Tensor | None
    ) -> Tensor:
        ctx.losses, ctx.size, ctx.num_rows = losses, size, num_rows
        ctx.save_for_backward(*inputs)
        chunks = zip(*(row.split(size) for row in inputs[:num_rows]), strict=True)  # type: ignore[union-attr]
        return torch.cat([losses(*chunk, *inputs[num_rows:]) for chunk in chunks])

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> Any:  # type: ignore[override]
        inputs, num_rows = ctx.saved_tensors, ctx.num_rows
        wanted = [index for index, want in enumerate(ctx.needs_input_grad[3:]) if want]
        shared = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs[num_rows:]]
        grad_by_index: dict[int, Tensor] = {
            index: torch.empty_like(inputs[index]) for index in wanted if index < num_rows
        }
        for start in reversed(range(0, len(grad_S), ctx.size)):  # autograd's order
            part = slice(start, start + ctx.size)
            chunk = [row[part].detach().requires_grad_(row.requires_grad) for row in inputs[:num_rows]]
            given = [*chunk, *shared]
            with torch.enable_grad():
                losses_C = ctx.losses(*given)
            for index, grad in zip(
                wanted,
                torch.autograd.grad(losses_C, [given[wanted_index] for wanted_index in wanted], grad_S[part]),
                strict=True,
            ):
                if index < num_rows:
                    grad_by_index[index][part] = grad
                elif index in grad_by_index:
                    grad_by_index[index] += grad
                else:
                    grad_by_index[index] = grad.float()
        grads = (grad_by_index[index].to(x.dtype) if index in grad_by_index else None for index, x in enumerate(inputs))
        return None, None, None, *grads


def likelihoods(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Return fp32 [S, 2]: each label's log-likelihood, and whether it is the likeliest; in chunks."""
    size = chunk_tokens(weight_VE.shape[0])
    judgements = []
    for hidden_CE, labels_C in zip(hidden_SE.split(size), labels_S.split(size), strict=True):
        judgements.append(judged(rule.logits(hidden_CE, weight_VE, bias_V), labels_C))
    return torch.cat(judgements)


def judged(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Return fp32 [S, 2]: log-likelihood of each label under its logits, and whether it is the likeliest token."""
    likeliest_S = logits_SV.argmax(1) == labels_S
    return torch.stack([-F.cross_entropy(logits_SV, labels_S, reduction="none"), likeliest_S.float()], 1)


def with_adapter(
    loss: HeadLoss,
    hidden_SE: Tensor,
    inner_SR: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    up_VR: Tensor,
    labels_S: Tensor,
    rule: LogitRule = PLAIN,
) -> Tensor:
    """Compute `loss` of a head whose product is hidden @ weight.T + inner @ up.T: `likelihoods`, else losses.

    R is the adapter's rank. The rule's `hidden_scale` has been applied to both inputs.
    """

    def product(hidden_CE: Tensor, inner_CR: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(hidden_CE, weight, bias) + F.linear(inner_CR, up)

    shared = (weight_VE, up_VR) if bias_V is None else (weight_VE, up_VR, bias_V)
    return with_product(loss, product, (hidden_SE, inner_SR), shared, labels_S, rule)


def with_product(
    loss: HeadLoss,
    product: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    labels_S: Tensor,
    rule: LogitRule = PLAIN,
) -> Tensor:
    """Compute `loss` of a head whose product [C, V] of a chunk of `rows` is product(*rows, *shared).

    In chunks as `chunked_loss`, and recomputed in the backward pass like those: `likelihoods`, else losses. The first
    of `shared` is the head's weight [V, E]; the rule's `hidden_scale` has been applied.
    """
    chunk_loss: Any = functools.partial(F.cross_entropy, reduction="none")
    beside: tuple[Tensor, ...] = ()
    if isinstance(loss, ChunkLoss):
        rule, chunk_loss, beside = loss.of(rule), loss.of_chunk, loss.rows
    elif loss is likelihoods:
        chunk_loss = judged

    def of_chunk(labels_C: Tensor, *given: Tensor) -> Tensor:
        return chunk_loss(rule.finish(product(*given[len(beside) :]).float()), labels_C, *given[: len(beside)])

    size = chunk_tokens(shared[0].shape[0])
    if len(labels_S) <= size:
        return of_chunk(labels_S, *beside, *rows, *shared)
    return _chunked(of_chunk, size, labels_S, *beside, *rows, shared=shared)


def chunked_sum(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Return the sum of `chunked_loss`, [1], with nothing computed twice.

    Each chunk makes its gradients while its logits exist, and the backward pass only scales them. Keeps as much as
    the gradients weigh, from the head's forward to its backward. Tokens of one chunk run as `full_loss`.
    """
    if len(labels_S) <= chunk_tokens(weight_VE.shape[0]):
        return full_loss(hidden_SE, weight_VE, bias_V, labels_S, rule)
    if rule.hidden_scale != 1.0:
        hidden_SE = hidden_SE * rule.hidden_scale
    # Inside the function gradients are always off: whether they are wanted is known only out here.
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_SE, weight_VE, bias_V)]
    return _ChunkedSum.apply(hidden_SE, weight_VE, bias_V, labels_S, rule, wanted)  # type: ignore[return-value]


class _ChunkedSum(torch.autograd.Function):
    """Source: the idea of Liger's fused linear cross-entropy, https://arxiv.org/abs/2410.10989, section 3.2."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_SE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        labels_S: Tensor,
        rule: LogitRule,
        wanted: list[bool],
    ) -> Tensor:
        size = chunk_tokens(weight_VE.shape[0])
        total = torch.zeros(1, dtype=torch.float32, device=hidden_SE.device)
        grad_SE = torch.zeros_like(hidden_SE) if wanted[0] else None
        grad_VE = _WeightGradient(weight_VE, min(GATHERED_CHUNKS * size, len(labels_S))) if wanted[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wanted[2] else None
        for start in range(0, len(labels_S), size):
            hidden_CE, labels_C1 = hidden_SE[start : start + size], labels_S[start : start + size, None]
            logits_CV = rule.finish(F.linear(hidden_CE, weight_VE, bias_V).float())
            # The cap's derivative needs the logits again; without one they are overwritten.
            logp_CV = logits_CV if rule.cap is None else logits_CV.clone()
            logp_CV -= logp_CV.logsumexp(1, keepdim=True)
            total -= logp_CV.gather(1, labels_C1).sum()
            if not any(wanted):
                continue
            # d loss / d logits = softmax - one-hot
            grad_CV = logp_CV.exp_().scatter_add_(1, labels_C1, logp_CV.new_full((), -1.0).expand_as(labels_C1))
            grad_CV = rule.slope_(grad_CV, logits_CV)
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VE.dtype) if grad_VE is None else grad_VE.add(grad_CV, hidden_CE)
            if grad_SE is not None:
                torch.mm(grad_CV, weight_VE, out=grad_SE[start : start + size])
        ctx.save_for_backward(grad_SE, None if grad_VE is None else grad_VE.finish(), grad_V)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_SE, weight_VE, bias_V)]
        ctx.used = False
        return total

    @staticmethod
    def backward(ctx: Any, grad_1: Tensor) -> Any:  # type: ignore[override]
        if ctx.used:
            raise RuntimeError("chunked_sum has given its gradients away: run the forward again")
        ctx.used = True
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else _scale_(grad, grad_1).to(dtype) for grad, dtype in grads), None, None, None


GATHERED_CHUNKS = 2
"""Chunks whose half-precision gradients of logits are kept for one product with the hidden states."""


class _WeightGradient:
    """The head's gradient, [V, E], added over chunks in fp32.

    In half precision a chunk's product would be rounded and then added, which moves 12 bytes an element where adding
    in bf16 moves 4: so several chunks wait for one product, whose tensor cores add in fp32 too.
    """

    def __init__(self, weight_VE: Tensor, rows: int) -> None:
        self._total_VE = torch.zeros_like(weight_VE, dtype=torch.float32)
        self._dtype = weight_VE.dtype
        self._waits = weight_VE.dtype != torch.float32
        if self._waits:
            self._grad_GV = weight_VE.new_empty(rows, weight_VE.shape[0])
            self._hidden_GE = weight_VE.new_empty(rows, weight_VE.shape[1])
            self._filled = 0

    def add(self, grad_CV: Tensor, hidden_CE: Tensor) -> Tensor:
        """Take in a chunk; returns its gradient of the logits in the weight's type."""
        if not self._waits:
            self._total_VE.addmm_(grad_CV.T, hidden_CE)
            return grad_CV
        if self._filled + len(grad_CV) > len(self._grad_GV):
            self._multiply()
        rows = slice(self._filled, self._filled + len(grad_CV))
        self._hidden_GE[rows] = hidden_CE
        self._grad_GV[rows] = grad_CV
        self._filled += len(grad_CV)
        return self._grad_GV[rows]

    def finish(self) -> Tensor:
        """Return the sum over all chunks, fp32."""
        if self._waits:
            self._multiply()
            del self._grad_GV, self._hidden_GE
        return self._total_VE

    def _multiply(self) -> None:
        """Multiply in parts of at most CHUNK_BYTES: a product of the head's size is many models' largest tensor."""
        rows = max(1, CHUNK_BYTES // (4 * self._total_VE.shape[1]))
        grad_GV, hidden_GE = self._grad_GV[: self._filled], self._hidden_GE[: self._filled]
        for total, grad in zip(self._total_VE.split(rows), grad_GV.split(rows, dim=1), strict=True):
            total += grad.T @ hidden_GE
        self._filled = 0


def _scale_(grad: Tensor, by_1: Tensor) -> Tensor:
    """Multiply in place in fp32: in bf16 the factor alone would be rounded by up to 0.4 %, the same way for all."""
    if grad.dtype == torch.float32:
        return grad.mul_(by_1)
    rows = max(1, CHUNK_BYTES // (4 * max(1, grad[0].numel())))
    for part in grad.split(rows):
        part.copy_(part.float() * by_1)
    return grad


def fused_loss(
    hidden_SE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_S: Tensor, rule: LogitRule = PLAIN
) -> Tensor:
    """Run Liger's fused linear cross-entropy, which makes gradients in the forward, so gives their sum: [1].

    It has a cap and no scale: scales go into the hidden states, and where a bias forbids that the chunked sum runs.
    """
    if rule.scale != 1.0 and bias_V is not None:
        return chunked_sum(hidden_SE, weight_VE, bias_V, labels_S, rule)
    factor = rule.hidden_scale * rule.scale
    if factor != 1.0:
        hidden_SE = hidden_SE * factor
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    fused = functional.liger_fused_linear_cross_entropy
    more: dict[str, Any] = {}
    if "accum_dtype" in inspect.signature(fused).parameters:  # from 0.6.1 on: chunks' gradients are added in fp32
        more["accum_dtype"] = torch.float32
    loss = fused(hidden_SE, weight_VE, labels_S, bias=bias_V, reduction="sum", softcap=rule.cap, **more)
    return loss.reshape(1)
