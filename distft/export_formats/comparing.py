"""Compares what two models make of the same tokens. Every function returns one `Comparison`.

Shape letters: L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distft.export_formats.gguf_vocabulary import puts_bos
from distft.export_formats.proof_rows import ProofRows
from distft.export_formats.reference import Greedy, SourceReference
from distft.export_formats.spec import Comparison

GREEDY_TOKENS = 64
KL_POSITIONS = 128
"""Positions whose whole distributions are compared."""


def answer_end(reference: SourceReference, rows: ProofRows) -> Comparison:
    """Whether what the chat template writes behind an answer is a token that the model stops at."""
    tokenizer = reference.tokenizer
    named = "answers end at a stop token"
    for chat in rows.chats[:1]:
        prompt, answer = reference.render(chat), "Yes."
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], tokenize=False)
        if not whole.startswith(prompt + answer):
            detail = "the template writes answers otherwise than it asks for them: not looked at"
            return Comparison(name=named, compared="nothing", count=0, value=0, bound="-", ok=True, detail=detail)
        behind = tokenizer(whole[len(prompt + answer) :], add_special_tokens=False)["input_ids"]
        first = behind[0] if behind else None
        ok = first is None or first in reference.stop_ids or first not in _special_ids(tokenizer)
        text = "" if first is None else tokenizer.convert_ids_to_tokens(first)
        detail = ""
        if not ok:
            detail = f"the template ends answers with {text} ({first}), which is no stop token"
        return Comparison(name=named, compared="end of a rendered answer against generation_config.json", count=1,
                     value=0 if ok else 1, bound="0 that do not", ok=ok, detail=detail)  # fmt: skip
    return Comparison(name=named, compared="no chat template", count=0, value=0, bound="-", ok=True)


def tokenization(
    reference: SourceReference, rows: ProofRows, encode: Callable[[str, bool], Sequence[int]], *, served: bool = False
) -> Comparison:
    """Texts cut into the same tokens.

    Args:
        reference: the source.
        rows: holds the texts.
        encode: (text, with special tokens around) -> ids.
        served: special tokens around are those that a server puts (`puts_bos`), not the tokenizer's own.
    """
    bare = served and not puts_bos(reference.tokenizer)
    wrong, detail = 0, ""
    for special in (False, True):
        for text in rows.texts:
            want = reference.tokenizer(text, add_special_tokens=special and not bare)["input_ids"]
            have = list(encode(text, special))
            if want != have:
                wrong += 1
                detail = detail or f"{text[:60]!r}: {want[:8]}… became {have[:8]}…"
    return Comparison(
        name="tokenisation", compared="token ids of texts, with and without special tokens around",
        count=2 * len(rows.texts), value=wrong, bound="0 that differ", ok=wrong == 0, detail=detail,
    )  # fmt: skip


def rendering(
    reference: SourceReference,
    rows: ProofRows,
    ids_of: Callable[[Sequence[dict[str, Any]]], Sequence[int]],
    *,
    name: str = "chat template",
) -> Comparison:
    """Chats rendered into the same tokens. `ids_of`: chat -> ids of the prompt."""
    wrong, detail = 0, ""
    for chat in rows.chats:
        want = reference.tokenizer(reference.render(chat), add_special_tokens=False)["input_ids"]
        have = list(ids_of(chat))
        if want != have:
            wrong += 1
            show = reference.tokenizer.decode
            detail = detail or f"{show(want)[:160]!r} became {show(have)[:160]!r}"
    return Comparison(
        name=name, compared="token ids of rendered chats", count=len(rows.chats), value=wrong,
        bound="0 that differ", ok=wrong == 0, detail=detail,
    )  # fmt: skip


def stops(reference: SourceReference, ends_at: Callable[[int], bool]) -> Comparison:
    """The source's stop tokens end an answer, and no other added token does.

    Args:
        reference: the source.
        ends_at: a token -> whether writing it ends the answer.
    """
    # Qwen's <|fim_pad|> and others are no special tokens in transformers, and llama.cpp ends at them by their texts.
    added = set(reference.tokenizer.added_tokens_decoder)
    candidates = sorted({*_special_ids(reference.tokenizer), *added, *reference.stop_ids})
    ends = {token for token in candidates if ends_at(token)}
    names = reference.tokenizer.convert_ids_to_tokens
    missed, more = sorted(set(reference.stop_ids) - ends), sorted(ends - set(reference.stop_ids))
    details = [f"{names(token)} (id {token}) does not end an answer there" for token in missed]
    details += [
        f"{names(token)} (id {token}) ends an answer there, and not in the source: add the id to eos_token_id of its "
        "generation_config.json, if it may"
        for token in more
    ]
    return Comparison(
        name="stop tokens", compared="added tokens that end an answer when they are written", count=len(candidates),
        value=len(missed) + len(more), bound="0 that differ", ok=not missed and not more, detail="; ".join(details),
    )  # fmt: skip


def _special_ids(tokenizer: Any) -> set[int]:
    named = {token for token in tokenizer.all_special_ids if token is not None}
    return named | {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}


def prompts_of(reference: SourceReference, rows: ProofRows, context: int) -> list[list[int]]:
    """Return the prompts as ids; those that leave no room for an answer lose their start."""
    most = max(1, context - GREEDY_TOKENS - 1)
    encoded = (reference.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in rows.prompts)
    return [ids[-most:] for ids in encoded if ids]


def greedy_tokens(
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Greedy],
    write: Callable[[Sequence[int], int], Sequence[int]],
    *,
    tie: float | None,
) -> Comparison:
    """Likeliest continuations.

    Args:
        prompts: token ids.
        wanted: what the reference writes behind each.
        write: (prompt, most tokens) -> what the export writes.
        tie: tokens whose logits in the reference are so close count as equally likely, and what follows such a choice
            is not compared; None: differences are counted and allowed.
    """
    equal, tied, wrong, compared, detail = 0, 0, 0, 0, ""
    for prompt, want in zip(prompts, wanted, strict=True):
        have = list(write(prompt, GREEDY_TOKENS))
        place = next((n for n, (a, b) in enumerate(zip(want.ids, have, strict=False)) if a != b), None)
        if place is None and len(have) != len(want.ids):
            place = min(len(have), len(want.ids))
        compared += len(want.ids) if place is None else place
        if place is None:
            equal += 1
        elif tie is not None and place < min(len(have), len(want.ids)) and _gap(want, place, have[place]) <= tie:
            tied += 1
        else:
            wrong += 1
            detail = (
                detail or f"behind {list(prompt)[-4:]}, token {place}: {want.ids[place:][:4]}, now {have[place:][:4]}"
            )
    said = f"{equal} of {len(wanted)} equal" + (
        f", {tied} up to a choice between equally likely tokens" if tied else ""
    )
    return Comparison(
        name="greedy tokens", compared=f"{compared} tokens behind {len(wanted)} prompts: {said}", count=len(wanted),
        value=wrong, bound="rounded: any" if tie is None else "0 that differ", ok=tie is None or not wrong,
        detail=detail,
    )  # fmt: skip


def _gap(want: Greedy, place: int, token: int) -> float:
    return float(want.logits_LV[place].max() - want.logits_LV[place, token])


def passages(prompts: Sequence[Sequence[int]], wanted: Sequence[Greedy]) -> list[tuple[list[int], int]]:
    """Return (tokens, first position that is looked at) of prompts with what the reference writes behind them."""
    return [([*prompt, *want.ids], max(0, len(prompt) // 2 - 1)) for prompt, want in zip(prompts, wanted, strict=True)]


def divergence(
    reference: SourceReference,
    read: Sequence[tuple[list[int], int]],
    logprobs: Callable[[list[int]], Mapping[int, float] | Tensor],
    *,
    bound: float,
) -> tuple[Comparison, dict[str, float]]:
    """Mean KL(reference ‖ export) of next tokens in nats, and both perplexities of the tokens that are there.

    Args:
        reference: the source.
        read: see `passages`.
        logprobs: tokens -> log-probabilities of what follows them.
        bound: largest mean allowed.
    """
    places = [(ids, place) for ids, first in read for place in range(first, len(ids) - 1)]
    stride = max(1, math.ceil(len(places) / KL_POSITIONS))
    kls, have_nll, want_nll = [], 0.0, 0.0
    chosen = places[::stride]
    for ids in {tuple(ids): ids for ids, _ in chosen}.values():
        want_LV = reference.logprobs(ids)
        for place in (place for other, place in chosen if other is ids or other == ids):
            want_V = torch.log_softmax(want_LV[place].double(), dim=0)
            kl, nll = _compared(want_V, logprobs(ids[: place + 1]), ids[place + 1])
            kls.append(kl)
            want_nll -= float(want_V[ids[place + 1]])
            have_nll += nll
    mean = math.fsum(kls) / len(kls) if kls else 0.0
    figures = {
        "kl_nats": mean,
        "perplexity": math.exp(min(700.0, have_nll / max(1, len(kls)))),
        "reference_perplexity": math.exp(min(700.0, want_nll / max(1, len(kls)))),
    }
    ok = math.isfinite(mean) and mean <= bound
    check = Comparison(
        name="distributions", compared="mean KL(source ‖ export) of next tokens, in nats", count=len(kls), value=mean,
        bound=f"at most {bound:g}", ok=ok, detail=f"largest {max(kls):.3g}" if kls else "",
    )  # fmt: skip
    return check, figures


def _compared(want_V: Tensor, have: Mapping[int, float] | Tensor, target: int) -> tuple[float, float]:
    """Return KL(want ‖ have), and the export's loss of the token that is there.

    Both sides are held against each other over the tokens that the runtime named. What it leaves out cannot be told
    from 1 minus their sum: the runtime adds up in fp32.
    """
    if isinstance(have, Tensor):
        have_V = torch.log_softmax(have.double(), dim=0)
        return _kl(want_V, have_V), -float(have_V[target])
    have_S = torch.tensor(list(have.values()), dtype=torch.float64).clamp(min=-700.0)
    want_S = torch.log_softmax(want_V[torch.tensor(list(have))], dim=0)
    return _kl(want_S, torch.log_softmax(have_S, dim=0)), -have.get(target, min(have.values()))


def _kl(want: Tensor, have: Tensor) -> float:
    return float((want.exp() * (want - have)).sum())
