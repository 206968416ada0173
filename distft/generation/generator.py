"""Generates completions and scores log-likelihoods with the trained model, in batches, under any engine.

Rows are spread over ranks. Where a forward gathers weights, every rank has to run as many: ranks that have nothing
left run forwards of one token until all are done. Every few forwards all ranks agree on whether to go on, so that a
wish to stop is granted within a long evaluation.

Shape letters: B rows of a batch, L positions, V vocabulary, N tokens of an answer, S weighed tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distft.core.errors import MachineError
from distft.core.out_of_memory import held, is_out_of_memory
from distft.core.phase import PHASE
from distft.core.types import Engine
from distft.core.virtual_tokens import VIRTUAL_ID
from distft.generation.batching import CACHE_SHARE, MAX_ROWS, PROMPT_TOKENS, BatchLimits, pad_left, split_batches
from distft.generation.completion import Completion, Prompt, SamplingParams, completion_of
from distft.generation.grammar import TokenConstraint
from distft.generation.sampling import draws, logprobs_of, next_tokens
from distft.model import inference as modes
from distft.model.causal import CausalLM

AGREE_EVERY = 8
"""Forwards between two looks at whether all are done, or somebody wants to stop."""
HOST_CACHE_BYTES = 1 << 30
SHRINK_AT = 0.75
"""A batch is made smaller once so few of its rows are unfinished: each time all of its cache is copied."""


Work = Callable[[list[int], dict[int, Any]], Iterator[None]]
"""(rows, where their results go): runs one forward each time it is asked to go on."""


class Generator:
    """Generates with the engine's model. Every method is collective: all ranks pass the same arguments."""

    def __init__(
        self,
        engine: Engine,
        module: CausalLM,
        *,
        decode: Callable[[list[int]], str],
        stop_ids: Sequence[int],
        stop: Callable[[], bool],
        heard: Callable[[int, int], None] | None = None,
        constrain: Callable[[int], TokenConstraint] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            engine: holds the model's weights.
            module: what the engine wraps.
            decode: tokens of an answer -> its text, special tokens left out.
            stop_ids: tokens that end an answer.
            stop: whether this process was asked to stop.
            heard: called with (index of the prompt, token) as soon as a token of its answer is chosen.
            constrain: index of a prompt -> which tokens its answer may go on with. Other tokens have the probability
                zero, in the answer's log-probabilities, too.
        """
        self._engine, self._module, self._decode, self._stop = engine, module, decode, stop
        self._heard, self._constrain = heard, constrain
        self._stop_ids = frozenset(stop_ids)
        self.longest = modes.longest_text(module.transformer.config)
        """Positions that the model can read; None: not known."""
        self.seconds = 0.0
        """That the last call took, gathering left out."""
        self.share = 1.0
        """Share of a batch that is answered at once: less after memory ran out."""

    def truncate_prompt(self, ids: Sequence[int], room: int) -> Sequence[int]:
        """Cut the start of a prompt so that `room` tokens are left for its answer; one token of it stays.

        A method's virtual tokens, which prompts begin with, stay too.
        """
        virtual = sum(token >= VIRTUAL_ID for token in ids)
        most = len(ids) - virtual if self.longest is None else max(1, self.longest - room - virtual)
        return [*ids[:virtual], *ids[virtual:][-most:]] if virtual else ids[-most:]

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        """Generate an answer to each prompt, in order; None when some rank was asked to stop before the end."""
        return self._run_batches(
            [len(prompt.ids) for prompt in prompts],
            how.max_new_tokens,
            how.batch_size,
            lambda batch, keep: self._generate_batch([prompts[index] for index in batch], batch, how, keep),
        )

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int | None = None
    ) -> list[tuple[float, bool]] | None:
        """Return each continuation's log-likelihood after its context, and whether the model would write it.

        In nats, summed over its tokens; None when some rank was asked to stop. Neither part may be empty.
        """
        return self._run_batches(
            [len(context) + len(continuation) for context, continuation in pairs],
            0,
            batch_size,
            lambda batch, keep: self._loglikelihoods([pairs[index] for index in batch], batch, keep),
        )

    def token_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float
    ) -> list[list[float]] | None:
        """Return the log-probability of each token of an answer after its prompt, at this temperature (0 counts as 1).

        For a few short answers: all logits of a batch exist at once. None when some rank was asked to stop. Neither
        part of a pair may be empty.
        """
        return self._run_batches(
            [len(prompt) + len(answer) for prompt, answer in pairs],
            0,
            None,
            lambda batch, keep: self._token_logprobs([pairs[index] for index in batch], batch, keep, temperature),
        )

    def _run_batches(
        self,
        lengths: Sequence[int],
        new_tokens: int,
        rows: int | None,
        work: Work,
    ) -> list[Any] | None:
        """Run `work` on this rank's batches and collect every rank's results by index.

        `work` runs one forward each time it is asked to go on.
        """
        engine, mine = self._engine, {}
        began = time.monotonic()
        with engine.evaluating(), modes.generation_mode(self._module), self._without_autograd():
            batches = split_batches(lengths, new_tokens, self._limits(rows), engine.world)
            for first in range(0, len(batches), engine.world):
                batch_index = first + engine.rank
                if not self._together(
                    self._in_parts(batches[batch_index], mine, work) if batch_index < len(batches) else None
                ):
                    return None
        self.seconds = time.monotonic() - began
        results: dict[int, Any] = {}
        for part in engine.gather(mine):
            results |= part
        return [results[index] for index in range(len(lengths))]

    def _without_autograd(self) -> contextlib.AbstractContextManager[Any]:
        """Let tensors do without what autograd keeps of them, which is much of a token's time in a small model.

        Not where forwards gather weights: engines keep those, and train with them afterwards.
        """
        return contextlib.nullcontext() if self._engine.collective_forward else torch.inference_mode()

    def _in_parts(self, batch: list[int], keep: dict[int, Any], work: Work) -> Iterator[None]:
        """Run `work` on a batch, in smaller parts once memory has run out, which changes no answer."""
        most = max(1, int(len(batch) * self.share))
        for start in range(0, len(batch), most):
            yield from self._in_halves(batch[start : start + most], len(batch), keep, work)

    def _in_halves(self, batch: list[int], of: int, keep: dict[int, Any], work: Work) -> Iterator[None]:
        """Run again in halves when memory runs out.

        Raises:
            MachineError: one row does not fit; or the forward gathers weights, and ranks would gather past each other.
        """
        try:
            yield from work(batch, keep)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1 or self._engine.collective_forward:
                few = f"set batch_size = {len(batch) // 2} in [[eval.answers]]"
                fix = few if len(batch) > 1 else "lower max_new_tokens, or ask shorter questions"
                raise MachineError(
                    f"memory ran out while {len(batch)} rows were answered at once{held()}  {fix}"
                ) from error
        # Outside of the handler: there the error would still hold what did not fit.
        self.share = min(self.share, len(batch) / 2 / of)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            yield from self._in_halves(part, of, keep, work)

    def _together(self, work: Iterator[None] | None) -> bool:
        """Go on with this rank's work until no rank has any; False when one wants to stop."""
        engine, number = self._engine, 0
        while True:
            if number % AGREE_EVERY == 0:
                PHASE.enter("eval")
                busy, stops = engine.sum_over_ranks(work is not None, self._stop())
                if stops or not busy:
                    return not stops
            number += 1
            if work is not None and next(work, work) is work:
                work = None
                if engine.world == 1:
                    return True
            if work is None and engine.collective_forward:
                self._forward([[0]])

    def _generate_batch(
        self, prompts: Sequence[Prompt], names: Sequence[int], how: SamplingParams, keep: dict[int, Completion]
    ) -> Iterator[None]:
        device, longest = self._engine.device, how.max_new_tokens
        draw_BN = draws([prompt.seed_key for prompt in prompts], longest, how.seed, device) if how.temperature else None
        # Several answers to one prompt: it is read once, and what the cache has of it is copied.
        places: dict[tuple[int, ...], int] = {}
        place_B = [places.setdefault(tuple(prompt.ids), len(places)) for prompt in prompts]
        most = max(map(len, places)) + longest
        cache = None if self._module.path.generation == "uncached" else modes.new_cache(self._module, most)
        is_shared = cache is not None and len(places) < len(prompts)
        read = pad_left(list(places) if is_shared else [prompt.ids for prompt in prompts], device, room=longest)
        ids_BL, positions_BL, mask_BK, width = read.ids_BL, read.positions_BL, read.mask_BL, read.ids_BL.shape[1]
        rows = [_Row(name, self._constrain and self._constrain(name)) for name in names]
        heard, stop_ids = self._heard, self._stop_ids
        for number in range(longest):
            logits_BV = self._engine.inference_module(
                input_ids_BL=ids_BL,
                attention_mask_BK=None if mask_BK is None else mask_BK[:, : width + number],
                position_ids_BL=positions_BL,
                cache=cache,
            )
            if is_shared and number == 0:
                assert cache is not None
                copied_B = torch.tensor(place_B, device=device)
                cache.batch_select_indices(copied_B)
                logits_BV, positions_BL = logits_BV[copied_B], positions_BL[copied_B]
                mask_BK = None if mask_BK is None else mask_BK[copied_B]
            if self._constrain is not None:
                logits_BV = _within(logits_BV, rows)
            draw_B = None if draw_BN is None else draw_BN[:, number]
            token_B, logprob_B = next_tokens(logits_BV, draw_B, how.temperature, how.top_p, logprobs=how.logprobs)
            tokens, logprobs = _listed(token_B, logprob_B)
            alive: list[int] = []
            # Runs for each token: few calls.
            for index, row in enumerate(rows):
                if row.done:
                    continue
                token = tokens[index]
                row.taken.append(token)
                if row.constraint is not None:
                    row.constraint.take(token)
                if logprobs is not None:
                    row.logprobs.append(logprobs[index])
                if token in stop_ids:
                    row.done = row.ends_with_token = True
                elif how.stop:
                    row.done = self._says_stop(row.taken, how.stop)
                if heard is not None:
                    heard(row.name, token)
                if not row.done:
                    alive.append(index)
                if row.done or number + 1 == longest:
                    keep[row.name] = self._answer(row, how.stop)
            yield
            if not alive:
                return
            if cache is not None and len(alive) <= SHRINK_AT * len(rows):
                kept_B = torch.tensor(alive, device=device)
                cache.batch_select_indices(kept_B)
                rows = [rows[index] for index in alive]
                token_B, positions_BL = token_B[kept_B], positions_BL[kept_B]
                mask_BK = None if mask_BK is None else mask_BK[kept_B]
                draw_BN = None if draw_BN is None else draw_BN[kept_B]
            positions_B1 = positions_BL[:, -1:] + 1
            if cache is None:  # everything is read again: one row, see `ForwardPath.generation`
                ids_BL = torch.cat([ids_BL, token_B[:, None]], dim=1)
                positions_BL = torch.cat([positions_BL, positions_B1], dim=1)
            else:
                ids_BL, positions_BL = token_B[:, None], positions_B1

    def _loglikelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        names: Sequence[int],
        keep: dict[int, tuple[float, bool]],
    ) -> Iterator[None]:
        rows, at_S, labels_S = _continued(pairs)
        scored_S2 = self._forward(rows, at_S=at_S, labels_S=labels_S).cpu().double()
        counts = [len(continuation) for _, continuation in pairs]
        for name, scored in zip(names, scored_S2.split(counts), strict=True):
            keep[name] = (float(scored[:, 0].sum()), bool(scored[:, 1].all()))
        yield

    def _token_logprobs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        names: Sequence[int],
        keep: dict[int, list[float]],
        temperature: float,
    ) -> Iterator[None]:
        rows, at_S, labels_S = _continued(pairs)
        logits_SV = self._forward(rows, at_S=at_S)
        logprobs = iter(logprobs_of(logits_SV, labels_S.to(logits_SV.device), temperature))
        for name, (_, answer) in zip(names, pairs, strict=True):
            keep[name] = [next(logprobs) for _ in answer]
        yield

    def _forward(
        self, rows: Sequence[Sequence[int]], *, at_S: Sequence[int] = (0,), labels_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one forward of whole rows, without a cache."""
        device = self._engine.device
        read = pad_left(rows, device)
        return self._engine.inference_module(
            input_ids_BL=read.ids_BL,
            attention_mask_BK=read.mask_BL,
            position_ids_BL=read.positions_BL,
            at_S=torch.tensor(at_S, device=device),
            labels_S=None if labels_S is None else labels_S.to(device),
        )

    def _answer(self, row: _Row, stop: tuple[str, ...]) -> Completion:
        return completion_of(
            row.taken,
            row.logprobs,
            ends_with_token=row.ends_with_token,
            ended=row.done,
            decode=self._decode,
            stop=stop,
        )

    def _says_stop(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        """Return whether the last tokens hold a stop text.

        A token writes a byte at least, and the one before the last ones may hold the start of the text.
        """
        last = self._decode(ids[-(max(len(stop_text.encode()) for stop_text in stop) + 4) :])
        return any(stop_text in last for stop_text in stop)

    def _limits(self, rows: int | None) -> BatchLimits:
        """Return the limits of the rank with least free memory, equal on all ranks: they must cut equal batches."""
        engine, config = self._engine, self._module.transformer.config
        if self._module.path.generation != "batched":
            return BatchLimits(rows=1, prompt_tokens=PROMPT_TOKENS, cache_tokens=PROMPT_TOKENS)
        free = float(HOST_CACHE_BYTES)
        if engine.device.type == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = CACHE_SHARE * (torch.cuda.mem_get_info()[0] + unused)
        dtype = next(self._module.parameters()).dtype
        cache_tokens = int(min(engine.gather(free))) // modes.cache_bytes_per_token(config, dtype)
        return BatchLimits(rows=rows or MAX_ROWS, prompt_tokens=PROMPT_TOKENS, cache_tokens=cache_tokens)


def _continued(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """Return contexts with their continuations, the flattened positions before a continuation's tokens, and those."""
    rows = [[*context, *continuation][:-1] for context, continuation in pairs]  # nothing follows the last token
    width = max(map(len, rows))
    at_S = [
        (index + 1) * width - back
        for index, (_, continuation) in enumerate(pairs)
        for back in range(len(continuation), 0, -1)
    ]
    return rows, at_S, torch.tensor([token for _, continuation in pairs for token in continuation])


def _listed(token_B: torch.Tensor, logprob_B: torch.Tensor | None) -> tuple[list[int], list[float] | None]:
    """Return tokens and log-probabilities on the host, in one transfer: fp64 holds every token id."""
    if logprob_B is None:
        return token_B.tolist(), None
    tokens, logprobs = torch.stack([token_B.double(), logprob_B]).tolist()
    return [int(token) for token in tokens], logprobs


def _within(logits_BV: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
    """Return the logits with minus infinity for tokens that a row's constraint forbids, or does not know."""
    allowed_BV = torch.ones(logits_BV.shape, dtype=torch.bool)
    for row, allowed_V in zip(rows, allowed_BV, strict=True):
        if row.constraint is not None and not row.done:
            known_V = row.constraint.allowed()[: len(allowed_V)]
            allowed_V[: len(known_V)], allowed_V[len(known_V) :] = known_V, False
    return logits_BV.masked_fill(~allowed_BV.to(logits_BV.device), -torch.inf)


class _Row:
    """What a row has written so far."""

    __slots__ = ("constraint", "done", "ends_with_token", "logprobs", "name", "taken")

    def __init__(self, name: int, constraint: TokenConstraint | None = None) -> None:
        self.name, self.constraint, self.done = name, constraint, False
        self.ends_with_token = False
        """Its last token is one that ends answers."""
        self.taken: list[int] = []
        """Its tokens with the one that ends it."""
        self.logprobs: list[float] = []
