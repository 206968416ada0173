"""Whether this project's loss, gradients and answers are those of transformers' own model, found by computing both.

A small copy of the very config gets random weights drawn wide enough that every term counts. The reference is
transformers' own forward with its eager attention and its own loss, one document at a time. The paths of
`distft.model.paths` are held against it in their order, and the first that agrees is what a run uses.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from distft.core.errors import DistftError, MachineError
from distft.model import attention
from distft.model.blocks import blocks_of
from distft.model.bugs import raise_mistakes
from distft.model.paths import VARLEN, ForwardPath, Generation, training_paths
from distft.model.proof_verdict import Attempt, ProofVerdict
from distft.model.reference import NotEqualError, Reference
from distft.model.shrink import distinct_depth, small_copies
from distft.model.towers import text_parameters

MOST_PARAMETERS = 150_000_000
"""A copy larger than this is not built."""


def prove(
    config: Any,
    build: Callable[[Any, str], Any],
    *,
    attentions: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    precision: torch.dtype | None = None,
    compiled: bool = False,
) -> ProofVerdict:
    """Find the first path whose numbers are those of transformers' own model.

    Args:
        config: of the model; its small copy is what runs.
        build: (config, attention) -> that model of transformers, on the default device.
        attentions: names in transformers' attention registry, the fastest first.
        device: where the run computes.
        dtype: what the run computes in; 16 bits are compared as well on a GPU, whose kernels are others then.
        max_length: tokens in the run's longest document.
        precision: of the comparison; by default float64 on a CPU where the model runs in it, else float32.
        compiled: try the path that is found with its blocks compiled as well, and take that where it is equal.
    """
    half = dtype if device.type == "cuda" and dtype != torch.float32 else None
    precisions = [torch.float64, torch.float32] if device.type == "cpu" else [torch.float32]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        name = (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
        try:
            copies = list(small_models(config, build, max_length))
            reference = _reference(copies, build, device, precisions if precision is None else [precision])
            path, attempts, reason = _first_path(reference, tuple(attentions), half)
            if compiled and path is not None:
                path = _compiled(reference, path, half, attempts)
        except MachineError as error:
            path, attempts, reason = None, [], str(error)
        return ProofVerdict(architecture=name, path=path, attempts=tuple(attempts), reason=reason)


def _reference(
    copies: list[Any], build: Callable[[Any, str], Any], device: torch.device, precisions: list[torch.dtype]
) -> Reference:
    """Return Transformers' own numbers for the first copy that runs.

    Raises:
        MachineError: none does, or what runs is not causal; says why.
    """
    why = ""
    for small in copies:
        for precision in precisions:
            try:
                reference = Reference(small, build, device, precision)
                leak = reference.sees_the_future()
            except Exception as error:  # any: a copy that is no valid model; the next one changes less
                raise_mistakes(error)
                why = why or _reason(error)
                continue
            if leak is not None:
                raise MachineError(f"it is not causal: a later token changes earlier logits by {leak:.1e}")
            if reference.predicts_each_token_itself():
                raise MachineError("its own loss is of the tokens that it reads, not of the next ones")
            return reference
    raise MachineError(f"no small copy of it runs in transformers itself: {why}")


def _first_path(
    reference: Reference, attentions: tuple[str, ...], half: torch.dtype | None
) -> tuple[ForwardPath | None, list[Attempt], str]:
    """Return the path, what was tried before it, and, where there is none, why."""
    attempts: list[Attempt] = []
    heads_alike: set[str] = set()
    for path in training_paths(attentions):
        if path.head == "own" and path.documents in heads_alike:
            continue  # what differs is not the head's doing
        difference = difference_of(lambda path=path: reference.hold_training(path, half))
        if not difference:
            break
        if path.head == "own" and attempts[-1].difference == difference and difference.startswith("loss "):
            heads_alike.add(path.documents)
        attempts.append(Attempt(path=f"{path.documents}, {path.attention}, head {path.head}", difference=difference))
    else:
        return None, attempts, attempts[-1].difference if attempts else "there is nothing to try"
    modes: tuple[Generation, ...] = ("batched", "single", "uncached")
    for mode in modes:
        for kernel in ("sdpa", "eager"):
            answers = replace(path, generation=mode, generation_attention=kernel)
            difference = difference_of(lambda answers=answers: reference.hold_answers(answers))
            if not difference:
                return answers, attempts, ""
            attempts.append(Attempt(path=f"answers {mode}, {kernel}", difference=difference))
    return None, attempts, attempts[-1].difference


def _compiled(
    reference: Reference, path: ForwardPath, half: torch.dtype | None, attempts: list[Attempt]
) -> ForwardPath:
    """Return the path with compiled blocks, or as it is where they do not compile or give other numbers."""
    if path.documents == "single":
        difference = "one document per forward: each has another length"
    else:
        torch._dynamo.reset()
        difference = difference_of(lambda: reference.hold_training(replace(path, compiled=True), half))
        torch._dynamo.reset()
    if difference:
        attempts.append(Attempt(path="compiled", difference=difference))
    return replace(path, compiled=not difference)


def small_models(config: Any, build: Callable[[Any, str], Any], max_length: int) -> Iterator[Any]:
    """Yield small copies of a config that are valid models.

    Raises:
        MachineError: there is none; says why.
    """
    why, any_valid = "", False
    with torch.device("meta"):
        for small in _shrunk(config, build, max_length):
            try:
                lm = build(copy.deepcopy(small), "eager")
                reached = text_parameters(lm)
                numel = sum(param.numel() for param in lm.parameters() if id(param) in reached)
            except Exception as error:  # any: not a valid model; the next copy changes less
                raise_mistakes(error)
                why = _reason(error)
                continue
            if numel > MOST_PARAMETERS:
                why = why or f"its smallest copy has {numel:,} parameters"
                continue
            any_valid = True
            yield small
    if not any_valid:
        raise MachineError(f"no small copy of its config is a valid model: {why}")


def _shrunk(config: Any, build: Callable[[Any, str], Any], max_length: int) -> list[Any]:
    try:
        blocks = blocks_of(build(copy.deepcopy(config), "eager"))
        depths = dict.fromkeys(distinct_depth(blocks, times=times) for times in (1, 2))
        return [small for depth in depths for small in small_copies(config, depth=depth, max_length=max_length)]
    except Exception as error:  # any: a config whose own model cannot be built here, or that is none of a text model
        raise_mistakes(error)
        raise MachineError(_reason(error)) from error


def difference_of(compare: Callable[[], None]) -> str:
    """Return what a comparison says that differs, or why it cannot be made; "" when nothing differs."""
    try:
        compare()
    except NotEqualError as error:
        return str(error)
    except Exception as error:  # any: a path that cannot run is one that cannot be taken
        raise_mistakes(error)
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    """Return what an error says, with its type where it is none of ours."""
    return _first_line(error) if isinstance(error, DistftError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def attentions(wanted: str, device: torch.device, dtype: torch.dtype, *, head_size: int = 0) -> tuple[str, ...]:
    """Return the attentions to try for a recipe's `attention`, the fastest first.

    Args:
        wanted: what the recipe says.
        device: of the run.
        dtype: of the run.
        head_size: of the model itself, since the proof's copy has smaller heads; 0: not known.

    Raises:
        MachineError: flash was asked for where it cannot run.
    """
    first = attention.choose(wanted, device, dtype, head_size=head_size)
    if wanted != "auto":
        return (first,)
    between = (VARLEN,) if first not in (VARLEN, "sdpa") else ()
    flex = ("flex_attention",) if device.type == "cuda" else ()
    return tuple(dict.fromkeys((first, *between, *flex, "sdpa", "eager")))
