"""Transformers' own numbers for a small model, and this project's numbers held against them.

The weights are random and drawn wide enough that every term counts; the probes are documents of different lengths, each
read alone by transformers' own forward with its eager attention and its own loss.

Shape letters: T tokens of all probes, B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.types import IGNORE
from distft.model import cross_entropy, head, router
from distft.model.answering import answering, new_cache
from distft.model.causal import CausalLM
from distft.model.paths import ForwardPath
from distft.model.shrink import PROBE_LENGTHS, VOCABULARY
from distft.model.towers import text_parameters

LOSS_RTOL = 1e-5
"""Largest relative difference of a document's loss in fp32."""
GRADIENT_RTOL = 2e-4
"""Largest difference of a parameter's gradient, by the largest entry of that gradient or 1e-4 of the largest of all."""
LOGITS_RTOL = 1e-4
"""Largest difference of an answer's logits, by the largest of them."""
HALF_RTOL = 3e-2
"""The same of losses in 16 bits, on a GPU, where kernels sum in another order than the reference."""
NEW_TOKENS = 3
"""Tokens that each probe is continued by."""
_GAIN = 2.5
"""Of random matrices: attention scores of about 6, which a cap of 50 bends by some hundredths."""


class NotEqualError(Exception):
    """A path's numbers are not the reference's."""


class Reference:
    """Transformers' own numbers for the probes, one document at a time, and the model that they were computed with."""

    def __init__(self, config: Any, build: Callable[[Any, str], Any], device: torch.device) -> None:
        self._config, self._build, self._device = config, build, device
        self._values: dict[str, Tensor] = {}
        self._observed: head.Observation | None = None
        self.lm = self._fresh("eager")
        generator = torch.Generator().manual_seed(1)
        top = min(VOCABULARY - 8, self.lm.get_input_embeddings().weight.shape[0])
        self.probes = [torch.randint(3, top, (length,), generator=generator).to(device) for length in PROBE_LENGTHS]
        self.losses: list[float] = []
        self.logits: list[Tensor] = []
        count = sum(len(ids) - 1 for ids in self.probes)
        for ids in self.probes:
            # A copy for each: some models remember the longest text that they have seen.
            lm = copy.deepcopy(self.lm)
            output = lm(input_ids=ids[None], labels=ids[None], use_cache=False)
            if output.loss is None or not torch.isfinite(output.loss):
                raise RuntimeError("its own loss is not a number")
            loss_sum = output.loss * (len(ids) - 1)
            self.losses.append(float(loss_sum))
            self.logits.append(output.logits[0].detach().float())
            (loss_sum / count).backward()
            for mine, theirs in zip(self.lm.parameters(), lm.parameters(), strict=True):
                if theirs.grad is not None:
                    mine.grad = theirs.grad if mine.grad is None else mine.grad + theirs.grad
        self.gradients = {name: param.grad for name, param in self.lm.named_parameters() if not param.is_meta}

    @functools.cached_property
    def _noise(self) -> float:
        """How much transformers' own logits change when the tokens behind them are left out: rounding."""
        ids, right = self.probes[0][:-NEW_TOKENS], self.logits[0]
        with torch.no_grad():
            logits = copy.deepcopy(self.lm)(input_ids=ids[None], use_cache=False).logits[0].float()
        return float((logits - right[: len(ids)]).abs().max() / right.abs().max())

    def _fresh(self, kernel: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model with the reference's weights; what no text passes through has none."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            lm = self._build(copy.deepcopy(self._config), kernel)
        lm.tie_weights()
        self._observed = head.observe(lm)  # without values, as the run's own model is when it is observed
        reached = text_parameters(lm)
        if not self._values:
            self._values = {n: value.to(self._device) for n, value in drawn_weights(lm, reached)}
        made: dict[int, nn.Parameter] = {}
        for name, module in lm.named_modules():
            for short, meta in list(module._parameters.items()):
                if meta is None or id(meta) not in reached:
                    continue
                if id(meta) not in made:
                    made[id(meta)] = nn.Parameter(
                        self._values[f"{name}.{short}".removeprefix(".")].to(dtype, copy=True)
                    )
                module._parameters[short] = made[id(meta)]
            for short, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[short] = buffer.to(self._device)
        return lm.eval()

    def sees_the_future(self) -> float | None:
        """Return how much the last token changes the logits before it, None when it does not."""
        ids = self.probes[0].clone()
        ids[-1] = (ids[-1] + 1) % (VOCABULARY - 8)
        with torch.no_grad():
            other = copy.deepcopy(self.lm)(input_ids=ids[None], use_cache=False).logits[0].float()
        gap = float((other[:-1] - self.logits[0][:-1]).abs().max() / self.logits[0].abs().max())
        return gap if gap > LOGITS_RTOL else None

    def _wrapped(self, path: ForwardPath, dtype: torch.dtype = torch.float32) -> CausalLM:
        lm, observed = self._fresh(path.attention, dtype), self._observed
        if path.head == "chunked" and observed is None:
            raise NotEqualError("its forward does more between the last hidden state and the logits than is known here")
        if dtype == torch.float32:  # several chunks, so that their seams are compared too
            loss: cross_entropy.HeadLoss = functools.partial(_small_chunks, cross_entropy.chunked_sum)
        else:
            loss = cross_entropy.choose("auto", self._device)
        module = CausalLM(lm, loss, path=path, observed=observed, router=router.find(lm))
        return module.eval()

    def hold_training(self, path: ForwardPath, half: torch.dtype | None) -> None:
        """Compare losses and gradients of a path with the reference's.

        Raises:
            NotEqualError: says what differs and by how much.
        """
        self._hold_losses(self._wrapped(path), path, LOSS_RTOL, GRADIENT_RTOL)
        if half is not None:
            self._hold_losses(self._wrapped(path, half), path, HALF_RTOL, None)

    def _hold_losses(self, module: CausalLM, path: ForwardPath, rtol: float, gradient_rtol: float | None) -> None:
        count = sum(len(ids) - 1 for ids in self.probes)
        if path.documents == "packed":
            batches = [self.probes]
            expected = [sum(self.losses)]
            # Other neighbours, so that a leak that happens to be small shows; only their sum is compared.
        else:
            batches = [[ids] for ids in self.probes]
            expected = self.losses
        for documents, right in zip(batches, expected, strict=True):
            losses = module(**probe_batch(documents))
            loss_sum = losses[0].sum() + losses[1].sum() if isinstance(losses, tuple) else losses.sum()
            _hold("loss", float(loss_sum), right, rtol)
            (loss_sum / count).backward()
        if gradient_rtol is not None:
            got = {name.removeprefix("lm."): param.grad for name, param in module.named_parameters()}
            self._hold_gradients(got, gradient_rtol)

    def _hold_gradients(self, got: dict[str, Tensor | None], rtol: float) -> None:
        largest = max(float(grad.abs().max()) for grad in self.gradients.values() if grad is not None)
        for name, right in self.gradients.items():
            mine = got[name]
            if right is None:
                continue
            if mine is None:
                if float(right.abs().max()) > 1e-6 * largest:
                    raise NotEqualError(f"{name} gets no gradient")
                continue
            scale = max(float(right.abs().max()), 1e-4 * largest)
            gap = float((mine - right).abs().max()) / scale
            if not gap <= rtol:
                raise NotEqualError(f"the gradient of {name} differs by {gap:.1e} of its largest entry")

    def hold_answers(self, path: ForwardPath) -> None:
        """Compare the logits of continued probes with those of the whole text read at once.

        Raises:
            NotEqualError: says what differs and by how much.
        """
        module = self._wrapped(replace(path, attention="eager"))
        prompts = [ids[:-NEW_TOKENS] if len(ids) > NEW_TOKENS + 1 else ids[:1] for ids in self.probes]
        groups = [range(len(prompts))] if path.generation == "batched" else [[index] for index in range(len(prompts))]
        with answering(module), torch.no_grad():
            for group in groups:
                self._hold_group(module, path, [prompts[index] for index in group], list(group))

    def _hold_group(self, module: CausalLM, path: ForwardPath, prompts: list[Tensor], rows: list[int]) -> None:
        longest = max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        ids_BL = torch.stack([nn.functional.pad(ids, (pad, 0)) for ids, pad in zip(prompts, pads, strict=True)])
        at_1L = torch.arange(longest, device=self._device)[None]
        positions_BL = (at_1L - torch.tensor(pads, device=self._device)[:, None]).clamp(min=0)
        mask_BL = None
        if any(pads):
            mask_BL = torch.ones(len(rows), longest + NEW_TOKENS, dtype=torch.long, device=self._device)
            for row, pad in enumerate(pads):
                mask_BL[row, :pad] = 0
        cache = None if path.generation == "uncached" else new_cache(module)
        whole_BL = ids_BL
        for number in range(NEW_TOKENS):
            logits_BV = module(
                input_ids_BL=ids_BL,
                attention_mask_BK=None if mask_BL is None else mask_BL[:, : longest + number],
                position_ids_BL=positions_BL,
                at_S=torch.arange(1, len(rows) + 1, device=self._device) * ids_BL.shape[1] - 1,
                cache=cache,
            )
            nexts: list[Tensor] = []
            for row, logits_V, prompt in zip(rows, logits_BV, prompts, strict=True):
                at = len(prompt) - 1 + number
                right_V = self.logits[row][at]
                gap = float((logits_V - right_V).abs().max() / right_V.abs().max())
                if not gap <= max(LOGITS_RTOL, 4 * self._noise):
                    where = "the prompt's last token" if number == 0 else f"token {number} of the answer"
                    raise NotEqualError(f"logits at {where} differ by {gap:.1e}")
                nexts.append(self.probes[row][at + 1])
            next_B1 = torch.stack(nexts)[:, None]
            whole_BL = torch.cat([whole_BL, next_B1], dim=1)
            if cache is None:
                ids_BL, positions_BL = whole_BL, torch.arange(whole_BL.shape[1], device=self._device)[None]
            else:
                ids_BL, positions_BL = next_B1, positions_BL[:, -1:] + 1


def _hold(what: str, got: float, right: float, rtol: float) -> None:
    if not abs(got - right) <= rtol * abs(right):
        raise NotEqualError(f"{what} {got:.6f} for {right:.6f}")


def _small_chunks(
    loss: cross_entropy.HeadLoss,
    hidden_SE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    labels_S: Tensor,
    rule: cross_entropy.LogitRule,
) -> Tensor:
    """`loss` over several pieces."""
    size = max(1, len(labels_S) // 2)
    pieces = zip(hidden_SE.split(size), labels_S.split(size), strict=True)
    return torch.cat([loss(hidden_CE, weight_VE, bias_V, labels_C, rule).reshape(-1) for hidden_CE, labels_C in pieces])


def probe_batch(documents: Sequence[Tensor]) -> dict[str, Any]:
    """Return `Batch.inputs()` of documents laid end to end, every token but each first one a label."""
    device = documents[0].device
    lengths = [len(ids) for ids in documents]
    labels = [torch.cat([ids[1:], ids.new_full((1,), IGNORE)]) for ids in documents]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return {
        "input_ids_T": torch.cat(list(documents)),
        "labels_T": torch.cat(labels),
        "position_ids_T": torch.cat([torch.arange(length, device=device) for length in lengths]),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device),
        "max_seqlen": max(lengths),
        "num_supervised": sum(lengths) - len(lengths),
    }


def drawn_weights(lm: nn.Module, only: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield fp32 values for the parameters of `lm`, wide enough that caps, scales, sinks and gates change results.

    Matrices keep the size of what passes through them; vectors, whatever they mean, are around one half.

    Args:
        lm: the model; its own values are not looked at.
        only: ids of parameters; all when None.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(module.weight) for module in lm.modules() if isinstance(module, nn.Embedding)}
    for name, param in lm.named_parameters():
        if only is not None and id(param) not in only:
            continue
        value = torch.randn(param.shape, generator=generator)
        if id(param) not in embeddings:
            if param.dim() >= 2:
                fan_in = param.numel() // param.shape[0] if param.dim() == 2 else max(param.shape[-2:])
                value *= _GAIN * fan_in**-0.5
            else:
                value = 0.5 + 0.3 * value
        yield name, value
