"""Transformers' own numbers for a small model, and this project's numbers held against them.

The weights are random and drawn wide enough that every term counts; the probes are documents of different lengths, each
read alone by transformers' own forward with its eager attention and its own loss.

Shape letters: T tokens of all probes, B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.core.types import IGNORE
from distft.model import cross_entropy, head, load_balancing
from distft.model.activation_checkpointing import compile_blocks
from distft.model.blocks import blocks_of
from distft.model.causal import CausalLM
from distft.model.inference import generation_mode, new_cache
from distft.model.paths import ForwardPath
from distft.model.precision import in_double
from distft.model.shrink import PROBE_LENGTHS, VOCABULARY
from distft.model.towers import text_parameters


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Between what limits a tolerance follows the model's own rounding (relative)."""

    floor: float
    ceiling: float

    def tolerance(self, rounding: float) -> float:
        """Return what two orders of the same sums may differ by, where one's own rounding was measured."""
        return min(max(self.floor, _ROUNDINGS * rounding), self.ceiling)


_ROUNDINGS = 16
"""Two orders of summing differ by this many times what moving every weight by half a unit in its last place does."""
LOSS = {torch.float64: Bounds(floor=1e-9, ceiling=1e-6), torch.float32: Bounds(floor=1e-5, ceiling=1e-4)}
"""Largest relative difference of a document's loss."""
GRADIENT = {torch.float64: Bounds(floor=1e-7, ceiling=1e-5), torch.float32: Bounds(floor=2e-4, ceiling=3e-3)}
"""Largest difference of a parameter's gradient, by the largest entry of that gradient or 1e-4 of the largest of all."""
LOGITS = {torch.float64: Bounds(floor=1e-8, ceiling=1e-5), torch.float32: Bounds(floor=1e-4, ceiling=1e-3)}
"""Largest difference of an answer's logits, by the largest of them."""
HALF_RTOL = 3e-2
"""The same of losses in 16 bits, on a GPU, where kernels sum in another order than the reference."""
NEW_TOKENS = 3
"""Tokens that each probe is continued by."""
_GAIN = 2.5
"""Gain of random matrices: attention scores of about 6, which a cap of 50 bends by some hundredths."""


class NotEqualError(Exception):
    """A path's numbers are not the reference's."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What transformers' own model computes of the probes."""

    losses: list[float]
    """Sum over each probe's tokens."""
    logits: list[Tensor]
    """[L, V] of each probe."""
    gradients: dict[str, Tensor | None]
    """Gradients of the mean loss over all tokens, by the parameter's name."""

    @functools.cached_property
    def largest(self) -> float:
        """The largest entry of all gradients."""
        return max(float(grad.abs().max()) for grad in self.gradients.values() if grad is not None)


class Reference:
    """Transformers' own numbers for the probes, one document at a time, and the model that they were computed with."""

    def __init__(
        self,
        config: Any,
        build: Callable[[Any, str], Any],
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        """Compute the reference numbers, and how much of them is rounding.

        Args:
            config: of a small model.
            build: (config, attention) -> that model of transformers, on the default device.
            device: where to compute.
            precision: torch.float64, or torch.float32 where kernels have no other.

        Raises:
            RuntimeError: or whatever the model's own code raises: it does not run, or its loss is not a number.
        """
        self._config, self._build, self._device, self._precision = config, build, device, precision
        self._values: dict[str, Tensor] = {}
        self._observed: head.Observation | None = None
        with self._computing():
            lm = self._fresh("eager")
            generator = torch.Generator().manual_seed(1)
            top = min(VOCABULARY - 8, lm.get_input_embeddings().weight.shape[0])
            self.probes = [torch.randint(3, top, (length,), generator=generator).to(device) for length in PROBE_LENGTHS]
            self.right = self._numbers(lm)
            moved = self._numbers(self._moved(lm))
        pairs = zip(moved.losses, self.right.losses, strict=True)
        loss = max(abs(changed - right) / abs(right) for changed, right in pairs)
        pairs = zip(moved.logits, self.right.logits, strict=True)
        logits = max(float((changed - right).abs().max() / right.abs().max()) for changed, right in pairs)
        gradient, _ = self._gradient_gap(moved.gradients)
        self.loss_rtol = LOSS[precision].tolerance(loss)
        self.gradient_rtol = GRADIENT[precision].tolerance(gradient)
        self.logits_rtol = LOGITS[precision].tolerance(logits)

    def _computing(self) -> AbstractContextManager[None]:
        return in_double() if self._precision == torch.float64 else nullcontext()

    def _numbers(self, lm: Any) -> Numbers:
        """Return what `lm` computes for each probe alone; gradients are left on a copy."""
        count = sum(len(ids) - 1 for ids in self.probes)
        losses: list[float] = []
        logits: list[Tensor] = []
        gradients: dict[str, Tensor | None] = dict.fromkeys(n for n, p in lm.named_parameters() if not p.is_meta)
        for ids in self.probes:
            # A copy for each: some models remember the longest text that they have seen.
            fresh = copy.deepcopy(lm)
            output = fresh(input_ids=ids[None], labels=ids[None], use_cache=False)
            if output.loss is None or not torch.isfinite(output.loss):
                raise RuntimeError("its own loss is not a number")
            loss_sum = output.loss * (len(ids) - 1)
            losses.append(float(loss_sum))
            logits.append(output.logits[0].detach().to(self._precision))
            torch.autograd.backward(loss_sum / count)
            for name, param in fresh.named_parameters():
                if param.grad is not None:
                    before = gradients[name]
                    gradients[name] = param.grad if before is None else before + param.grad
        return Numbers(losses=losses, logits=logits, gradients=gradients)

    def _moved(self, lm: Any) -> Any:
        """Copy `lm` with every weight moved by up to half a unit in its last place: another rounding of it."""
        generator = torch.Generator().manual_seed(2)
        moved = copy.deepcopy(lm)
        with torch.no_grad():
            for param in moved.parameters():
                if not param.is_meta:
                    move = torch.rand(param.shape, generator=generator, dtype=self._precision).to(self._device) - 0.5
                    param.mul_(1 + torch.finfo(self._precision).eps * move.sign())
        return moved

    def _fresh(self, kernel: str, dtype: torch.dtype | None = None) -> Any:
        """Return the model with the reference's weights; what no text passes through has none."""
        dtype = dtype or self._precision
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
                    kind = torch.float64 if dtype == torch.float64 and buffer.is_floating_point() else buffer.dtype
                    module._buffers[short] = buffer.to(self._device, kind)
        return lm.eval()

    @functools.cached_property
    def _answers(self) -> list[list[Tensor]]:
        """Logits [V] of each probe's last tokens, each after reading the text before it and no more.

        Ropes that depend on the length of the text give others than the whole probe's.
        """
        answers: list[list[Tensor]] = []
        for ids, prompt in self._prompts():
            lm = self._fresh("eager")  # anew, because some models remember the longest text that they have seen
            prefixes = [ids[: len(prompt) + number] for number in range(NEW_TOKENS)]
            answers.append([lm(input_ids=prefix[None], use_cache=False).logits[0, -1] for prefix in prefixes])
        return answers

    def _prompts(self) -> list[tuple[Tensor, Tensor]]:
        """Return (probe, the part of it that is continued)."""
        return [(ids, ids[:-NEW_TOKENS] if len(ids) > NEW_TOKENS + 1 else ids[:1]) for ids in self.probes]

    def sees_the_future(self) -> float | None:
        """Return how much the last token changes the logits before it, None when it does not."""
        ids = self.probes[0].clone()
        ids[-1] = (ids[-1] + 1) % (VOCABULARY - 8)
        right = self.right.logits[0]
        with torch.no_grad(), self._computing():
            changed = self._fresh("eager")(input_ids=ids[None], use_cache=False).logits[0]
        gap = float((changed[:-1] - right[:-1]).abs().max() / right.abs().max())
        return gap if gap > self.logits_rtol else None

    def predicts_each_token_itself(self) -> bool:
        """Return whether the model's own loss is of the tokens that it reads, not of the next ones."""
        pairs = zip(self.right.logits, self.probes, self.right.losses, strict=True)
        return all(
            abs(float(F.cross_entropy(logits_LV, ids)) * (len(ids) - 1) - loss) <= 1e-5 * loss
            for logits_LV, ids, loss in pairs
        )

    def _wrapped(self, path: ForwardPath, dtype: torch.dtype | None = None) -> CausalLM:
        lm, observed = self._fresh(path.attention, dtype), self._observed
        if path.head == "chunked" and observed is None:
            raise NotEqualError("its forward does more between the last hidden state and the logits than is known here")
        if dtype is None:  # several chunks, so that their seams are compared too
            loss: cross_entropy.HeadLoss = functools.partial(_small_chunks, cross_entropy.chunked_sum)
        else:
            loss = cross_entropy.choose("auto", self._device)
        module = CausalLM(lm, loss, path=path, observed=observed, router=load_balancing.find(lm))
        if path.compiled:
            compile_blocks(blocks_of(lm))
        return module.eval()

    def hold_training(self, path: ForwardPath, half: torch.dtype | None) -> None:
        """Compare losses and gradients of a path with the reference's.

        Raises:
            NotEqualError: says what differs and by how much.
        """
        with self._computing():
            module = self._wrapped(path)
            self._hold_losses(module, path, self.loss_rtol)
            self._hold_gradients({name.removeprefix("lm."): param.grad for name, param in module.named_parameters()})
        if half is not None:
            self._hold_losses(self._wrapped(path, half), path, HALF_RTOL)

    def _hold_losses(self, module: CausalLM, path: ForwardPath, rtol: float) -> None:
        count = sum(len(ids) - 1 for ids in self.probes)
        if path.documents == "packed":
            batches = [self.probes]
            expected = [sum(self.right.losses)]
            # Other neighbours, so that a leak that happens to be small shows; only their sum is compared.
        else:
            batches = [[ids] for ids in self.probes]
            expected = self.right.losses
        for documents, right in zip(batches, expected, strict=True):
            losses = module(**probe_batch(documents))
            loss_sum = losses[0].sum() + losses[1].sum() if isinstance(losses, tuple) else losses.sum()
            _hold("loss", float(loss_sum), right, rtol)
            torch.autograd.backward(loss_sum / count)

    def _hold_gradients(self, got: dict[str, Tensor | None]) -> None:
        gap, name = self._gradient_gap(got)
        if gap == float("inf"):
            raise NotEqualError(f"{name} gets no gradient")
        if not gap <= self.gradient_rtol:
            raise NotEqualError(f"the gradient of {name} differs by {gap:.1e} of its largest entry")

    def _gradient_gap(self, got: dict[str, Tensor | None]) -> tuple[float, str]:
        """Return the largest difference of a gradient, infinite when there is none, and the parameter's name."""
        largest, worst, where = self.right.largest, 0.0, ""
        for name, right in self.right.gradients.items():
            mine = got[name]
            if right is None:
                continue
            if mine is None:
                gap = float("inf") if float(right.abs().max()) > 1e-6 * largest else 0.0
            else:
                gap = float((mine - right).abs().max()) / max(float(right.abs().max()), 1e-4 * largest)
            if not gap <= worst:  # not a number is the worst
                worst, where = gap, name
                if gap != gap:
                    break
        return worst, where

    def hold_answers(self, path: ForwardPath) -> None:
        """Compare the logits of continued probes with those of the text so far, read at once.

        Raises:
            NotEqualError: says what differs and by how much.
        """
        prompts = [prompt for _, prompt in self._prompts()]
        groups = [range(len(prompts))] if path.generation == "batched" else [[index] for index in range(len(prompts))]
        with self._computing(), torch.no_grad():
            module = self._wrapped(replace(path, attention="eager"))
            with generation_mode(module):
                for group in groups:
                    self._hold_group(module, path, [prompts[index] for index in group], list(group))

    def _hold_group(self, module: CausalLM, path: ForwardPath, prompts: list[Tensor], rows: list[int]) -> None:
        longest = max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        ids_BL = torch.stack([F.pad(ids, (pad, 0)) for ids, pad in zip(prompts, pads, strict=True)])
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
                cache=cache,
            )
            nexts: list[Tensor] = []
            for row, logits_V, prompt in zip(rows, logits_BV, prompts, strict=True):
                right_V = self._answers[row][number]
                gap = float((logits_V - right_V).abs().max() / right_V.abs().max())
                if not gap <= self.logits_rtol:
                    where = "the prompt's last token" if number == 0 else f"token {number} of the answer"
                    raise NotEqualError(f"logits at {where} differ by {gap:.1e}")
                nexts.append(self.probes[row][len(prompt) + number])
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
    """Compute `loss` over several pieces."""
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
