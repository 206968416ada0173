"""A transformers tokenizer as llama.cpp reads it: tokens, types, scores or merges, and the rule that splits text first.

llama.cpp has two tokenizers that matter here. "llama" merges the pair whose token has the highest score, over the whole
text, and falls back to bytes; a byte-fallback BPE is that with score = -rank of its merge. "gpt2" applies merges in
order within the pieces that a named pre-tokenizer cuts, and llama.cpp knows the names alone: a tokenizer whose pieces
have no name there is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from distft.core.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens (`gguf.TokenType`)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_SPLITS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
    _TEKKEN_WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""Regular expression of a tokenizer.json's only split -> name of the pre-tokenizer that cuts the same pieces."""
_IGNORES_MERGES = frozenset({"llama-bpe", "tekken"})
"""Pre-tokenizers with which llama.cpp takes a whole piece that is a token, whatever the merges say."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_UNREACHABLE_SCORE = -1e9


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` of a GGUF file says."""

    model: str
    """"llama" or "gpt2"."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    bos_id: int | None
    unk_id: int | None
    pad_id: int | None


def read_vocabulary(tokenizer: Any, num_embeddings: int) -> Vocabulary:
    """Return a fast transformers tokenizer as llama.cpp's.

    Args:
        tokenizer: a fast tokenizer.
        num_embeddings: rows of the embedding; ids that the tokenizer does not use are filled up as unused tokens.

    Raises:
        DataError: llama.cpp has no tokenizer that does the same; says which part it lacks.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown(f"model {model['type']}", "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"{key} = {model[key]!r} of its BPE", "none")
    vocabulary: dict[str, int] = dict(model["vocab"])
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    ids = [*vocabulary.values(), *added]
    if max(ids) >= num_embeddings:
        raise DataError(
            f"the tokenizer has ids up to {max(ids)}, and the embedding {num_embeddings} rows  "
            "export it with the tokenizer that it was trained with"
        )
    for entry in added.values():
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise _unknown(f"added token {entry['content']!r} with lstrip, rstrip or single_word", "plain added tokens")
    texts = {position: text for text, position in vocabulary.items()} | {
        position: entry["content"] for position, entry in added.items()
    }
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    _, add_eos = added_around(tokenizer)
    add_bos = puts_bos(tokenizer)
    if model.get("byte_fallback"):
        own = _sentencepiece_like(content, vocabulary, merges)
    else:
        own = _gpt2_like(content, model, merges)
    tokens, types = _tokens(texts, added, model.get("unk_token"), num_embeddings, is_bytes=own["model"] == "llama")
    if own["model"] == "llama":
        own["scores"] = _scores(tokens, own.pop("ranks"))
    return Vocabulary(
        **own,
        tokens=tokens,
        types=types,
        add_bos=add_bos,
        add_eos=add_eos,
        bos_id=tokenizer.bos_token_id,
        unk_id=tokenizer.unk_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def _tokens(
    texts: dict[int, str], added: dict[int, Any], unknown: str | None, count: int, *, is_bytes: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return text and type of every id."""
    tokens, types = [], []
    for position in range(count):
        text = texts.get(position)
        tokens.append(f"[PAD{position}]" if text is None else text)
        if text is None:
            types.append(UNUSED)
        elif text == unknown and is_bytes:
            types.append(UNKNOWN)
        elif position in added:
            types.append(CONTROL if added[position]["special"] else USER_DEFINED)
        elif is_bytes and _BYTE_TOKEN.fullmatch(text):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    if len(set(tokens)) != count:
        raise DataError("the tokenizer has one text under two ids, which llama.cpp refuses to load")
    return tuple(tokens), tuple(types)


def _scores(tokens: tuple[str, ...], ranks: dict[str, int]) -> tuple[float, ...]:
    """Return -rank of the first merge that makes each token: llama.cpp merges the highest score first."""
    return tuple(-float(ranks[token]) if token in ranks else _UNREACHABLE_SCORE for token in tokens)


def _sentencepiece_like(content: dict[str, Any], vocabulary: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    """Return the parts of a BPE over the whole text, with spaces as U+2581 and bytes for what has no token."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise _unknown(f"byte fallback without {missing[0]}", "a token for each byte")
    prefix = _space_prefix(content)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return {"model": "llama", "pre": "default", "ranks": ranks, "merges": None, "add_space_prefix": prefix}


def _space_prefix(content: dict[str, Any]) -> bool:
    """Return whether text starts with a space of its own.

    Raises:
        DataError: the normalizer or the pre-tokenizer does something else.
    """
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace" and not steps:
        if pre_tokenizer["replacement"] == "▁" and not pre_tokenizer.get("split", True):
            return pre_tokenizer.get("prepend_scheme") != "never"
    elif pre_tokenizer is None or _splits_nothing(pre_tokenizer):
        if steps == [replaces]:
            return False
        if steps == [{"type": "Prepend", "prepend": "▁"}, replaces]:
            return True
    raise _unknown(
        f"normalizer {_short(normalizer)} with pre_tokenizer {_short(pre_tokenizer)} and byte fallback",
        "spaces replaced by U+2581, with or without one before the text",
    )


def _splits_nothing(pre_tokenizer: dict[str, Any]) -> bool:
    """Gemma's: splits at spaces, of which the normalizer leaves none."""
    return pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "}


def _gpt2_like(content: dict[str, Any], model: dict[str, Any], merges: list[Any]) -> dict[str, Any]:
    """Return the parts of a BPE on bytes within pieces."""
    pre = _pre_tokenizer(content["pre_tokenizer"])
    if content["normalizer"] not in (None, {"type": "NFC"}):
        raise _unknown(f"normalizer {_short(content['normalizer'])}", "none or NFC")
    ignores = bool(model.get("ignore_merges"))
    if ignores != (pre in _IGNORES_MERGES):
        raise _unknown(f"ignore_merges = {ignores} with the pieces of {pre}", f"{not ignores}")
    texts = [f"{left} {right}" for left, right in merges]
    return {"model": "gpt2", "pre": pre, "scores": None, "merges": tuple(texts), "add_space_prefix": False}


def _pre_tokenizer(content: dict[str, Any] | None) -> str:
    """Return llama.cpp's name for the pieces that a tokenizer.json cuts.

    Raises:
        DataError: it has none.
    """
    steps = [] if content is None else content.get("pretokenizers", [content])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        own_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_regex:
            split = steps[0]
            name = _SPLITS.get(split["pattern"].get("Regex", ""))
            if name and split["behavior"] == "Isolated" and not split["invert"]:
                return name
    raise _unknown(f"pre_tokenizer {_short(content)}", f"the pieces of gpt-2, smollm, {', '.join(_SPLITS.values())}")


def added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer puts a beginning, and an end, around every text.

    Raises:
        DataError: it puts something else there.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos in (False, True):
        for add_eos in (False, True):
            if whole == (bos if add_bos else []) + bare + (eos if add_eos else []):
                return add_bos, add_eos
    raise _unknown(f"ids {whole} for 'a', which is {bare} without special tokens", "bos before and eos behind the text")


def puts_bos(tokenizer: Any) -> bool:
    """Return whether a server should put the beginning of sequence before every prompt.

    It should where the tokenizer does. Not where chats are rendered without one: a model that was trained on such chats
    would read a token that it has never seen there.
    """
    adds_bos, _ = added_around(tokenizer)
    if not adds_bos or not tokenizer.chat_template:
        return adds_bos
    chat = [{"role": "user", "content": "a"}]
    return tokenizer.apply_chat_template(chat, tokenize=False).startswith(tokenizer.bos_token)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _unknown(what: str, allowed: str) -> DataError:
    return DataError(f"tokenizer: llama.cpp has no {what}  allowed: {allowed}  fix: export it as safetensors instead")
