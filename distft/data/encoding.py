"""Text -> tokens, and which of them are trained: chats by spans of characters, raw text with its start and end.

Shape letter: T tokens of one sample.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distft.data.boundaries import ByteLengths, byte_lengths
from distft.data.chat_template import ChatTemplate, LossOn
from distft.data.drafts import Drawn, RawText, Span
from distft.data.rendered import Rendered
from distft.data.samples import RowError
from distft.data.special_tokens import MARKED

APART = "answers whose first characters merge with the template's header: tokenised apart, as they will be generated"
_NEAR_CHARS = 256
"""Before a trained turn, in which most templates write an added token."""


@dataclass(frozen=True, kw_only=True)
class Encoder(ABC):
    """Encodes texts with a tokenizer; `distft.data.render.Renderer` says which texts."""

    tokenizer: Any
    """A fast transformers tokenizer."""
    loss_on: LossOn

    @property
    @abstractmethod
    def template(self) -> ChatTemplate:
        """The chat template."""

    def _chats(self, drawn: Sequence[Drawn]) -> list[Rendered]:
        """Tokenise chats, in order; the tokens in a span are trained."""
        backend, lengths = self.tokenizer.backend_tokenizer, self._byte_lengths
        rendered: list[Rendered | None] = [self._apart(chat) if MARKED.search(chat.text) else None for chat in drawn]
        todo = [index for index, row in enumerate(rendered) if row is None]
        if lengths is not None:
            candidates = [index for index in todo if lengths.can_tell(drawn[index].text, drawn[index].spans)]
            encoded = backend.encode_batch_fast([drawn[index].text for index in candidates], add_special_tokens=False)
            for index, encoding in zip(candidates, encoded, strict=True):
                ids_T = np.array(encoding.ids, np.int32)
                trained_T = lengths.trained(ids_T, drawn[index].text, drawn[index].spans)
                if trained_T is not None:
                    rendered[index] = self._with_prompt_tokens(
                        self._rendered(drawn[index], ids_T, trained_T), drawn[index]
                    )
            todo = [index for index in todo if rendered[index] is None]
        encodings = backend.encode_batch([drawn[index].text for index in todo], add_special_tokens=False)
        for index, encoding in zip(todo, encodings, strict=True):
            rendered[index] = self._by_offsets(encoding, drawn[index])
        return [row for row in rendered if row is not None]

    def _raw_texts(self, drafts: Sequence[RawText]) -> list[Rendered]:
        """Tokenise raw texts, in order, in one batch: where a text has a prompt, that by itself too.

        What follows the prompt begins where its tokens and the joint ones part, as in TRL 1.16's SFTTrainer.
        """
        texts = [part for draft in drafts for part in (draft.prompt, draft.text) if part is not None]
        encoded = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=True))
        rows: list[Rendered] = []
        for draft in drafts:
            prompt = [] if draft.prompt is None else next(encoded).ids
            ids = self._with_eos(self._one_start(next(encoded).ids, draft.text), draft.text)
            if draft.prompt is not None:
                prompt = self._without_added_eos(self._one_start(prompt, draft.prompt), draft.prompt)
            shared = len(prompt)
            if ids[:shared] != prompt:  # seldom; comparing whole is a tenth of the time of comparing one by one
                shared = next(
                    (index for index, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b),
                    min(len(prompt), len(ids)),
                )
            trained_T = np.ones(len(ids), np.bool_)
            if self.loss_on != "all":
                trained_T[:shared] = False
            diverged = shared < len(prompt)
            ids_T = np.array(ids, np.int32)
            rows.append(
                Rendered(ids_T=ids_T, trained_T=trained_T, diverged=diverged, notes=draft.notes, stop_id=ids[-1])
            )
        return rows

    def _rendered(
        self, drawn: Drawn, ids_T: np.ndarray, trained_T: np.ndarray, notes: Mapping[str, str] | None = None
    ) -> Rendered:
        """Build a chat's row. Its last trained token ends its answer; where all is trained, the template tells it."""
        last = np.flatnonzero(trained_T)[-1:]
        whole = self.loss_on == "all"
        stop = self.tokenizer.convert_tokens_to_ids(self.template.stop) if whole else ids_T[last].sum()
        return Rendered(
            ids_T=ids_T,
            trained_T=trained_T,
            notes={**drawn.notes, **(notes or {})},
            empty=drawn.empty,
            stop_id=int(stop) if len(last) else -1,
        )

    def _by_offsets(self, encoding: Any, drawn: Drawn) -> Rendered:
        """Tokenise by the tokenizer's offsets; in pieces where a token covers both header and answer."""
        for begin, _ in drawn.spans:
            if self._merges(encoding, _token_at(encoding, begin, drawn.text), begin, drawn.text):
                return self._apart(drawn, merged=True)
        document = _chat(encoding, drawn.text, drawn.spans)
        row = self._rendered(drawn, document.ids_T, document.trained_T)
        return row if self._byte_lengths is None else self._with_prompt_tokens(row, drawn)

    def _with_prompt_tokens(self, row: Rendered, drawn: Drawn) -> Rendered:
        """Return the row, if the tokens before each trained turn are those of the prompt alone; else tokenised apart.

        Compared from the last added token on: no token reaches over one.
        """
        begins_T = np.flatnonzero(np.diff(row.trained_T.astype(np.int8), prepend=0) == 1)
        if len(begins_T) != len(drawn.spans):
            return row  # spans that adjoin, or the whole text
        for first, (begin, _) in zip(begins_T.tolist(), drawn.spans, strict=True):
            near = max(0, begin - _NEAR_CHARS)
            ends = [token.end() for token in self.template.any_token.finditer(drawn.text, near, begin)]
            start = ends[-1] if ends else 0
            header = self._plain_headers.get(drawn.text[start:begin])
            if header is None:
                encoded = self.tokenizer.backend_tokenizer.encode(drawn.text[start:begin], add_special_tokens=False)
                header = encoded.ids
                if ends:
                    self._plain_headers[drawn.text[start:begin]] = header
            if row.ids_T[max(0, first - len(header)) : first].tolist() != header:
                return self._apart(drawn, merged=True)
        return row

    @cached_property
    def _plain_headers(self) -> dict[str, list[int]]:
        """What stands between an added token and a trained turn, as tokens: few texts, again and again."""
        return {}

    def _merges(self, encoding: Any, first: int, begin: int, text: str) -> bool:
        """Return whether a span's first token begins before it; offsets may leave out the space that it begins with."""
        if not 0 < begin < len(text) or first >= len(encoding.ids):
            return False
        if encoding.offsets[first][0] < begin:
            return True
        if " " not in text[begin - 1 : begin + 1]:
            return False
        alone = self.tokenizer.backend_tokenizer.encode(text[:begin], add_special_tokens=False).ids
        return alone != encoding.ids[:first]

    def _apart(self, drawn: Drawn, *, merged: bool = False) -> Rendered:
        """Tokenise piece by piece, cut where training starts and around special tokens that stay text."""
        text, begins = drawn.text, {begin for begin, _ in drawn.spans}
        typed = {match.span(): match for match in MARKED.finditer(text)}
        cuts = sorted(
            {
                0,
                len(text),
                *begins,
                *(end for _, end in drawn.spans),
                *(position for span in typed for position in span),
            }
        )
        ids: list[int] = []
        trained: list[bool] = []
        for begin, end in itertools.pairwise(cuts):
            match = typed.get((begin, end))
            if match is None:
                piece_ids = self._piece(text[begin:end], first=begin == 0)
            else:
                piece_ids = [] if match[1] is None else self._as_text(match[1], first=begin == 0)
            ids += piece_ids
            trained += [any(first <= begin and end <= last for first, last in drawn.spans)] * len(piece_ids)
        notes = {APART: ""} if merged else {}
        return self._rendered(drawn, np.array(ids, np.int32), np.array(trained, np.bool_), notes)

    def _piece(self, text: str, *, first: bool) -> list[int]:
        """Return a piece of a text as tokens; behind a line break, or some tokenizers would put a space before it."""
        encode = self.tokenizer.backend_tokenizer.encode
        if first or self._byte_lengths is not None:
            return encode(text, add_special_tokens=False).ids
        head = encode("\n", add_special_tokens=False).ids
        ids = encode("\n" + text, add_special_tokens=False).ids
        return ids[len(head) :] if ids[: len(head)] == head else encode(text, add_special_tokens=False).ids

    def _as_text(self, token: str, *, first: bool) -> list[int]:
        """Return what a special token's name is as text: the tokenizer's steps without its added tokens.

        Raises:
            RowError: the vocabulary spells the name with the very token.
        """
        head = [] if first else self._plain_ids("\n")
        ids = self._plain_ids(("" if first else "\n") + token)
        ids = ids[len(head) :] if ids[: len(head)] == head else self._plain_ids(token)
        if self.tokenizer.convert_tokens_to_ids(token) in ids:
            raise RowError(f"the special token {token} cannot be written as text by this tokenizer")
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        backend = self.tokenizer.backend_tokenizer
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        splits = (
            [text]
            if backend.pre_tokenizer is None
            else [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for split in splits for token in backend.model.tokenize(split)]

    @cached_property
    def _byte_lengths(self) -> ByteLengths | None:
        return byte_lengths(self.tokenizer.backend_tokenizer)

    def _without_added_eos(self, ids: list[int], text: str) -> list[int]:
        """Remove an end-of-sequence token that the tokenizer has appended by itself."""
        added = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token)
        return ids[:-1] if added else ids

    def _one_start(self, ids: list[int], text: str) -> list[int]:
        """Return the ids with one begin-of-sequence, where the text writes it and the tokenizer adds it too."""
        start = self.tokenizer.bos_token_id
        typed = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        doubled = typed and ids[:2] == [start, start] and ids[:3] != [start, start, start]
        return ids[1:] if doubled else ids

    def _with_eos(self, ids: list[int], text: str) -> list[int]:
        """Return the ids with one end-of-sequence, wherever the text or the tokenizer wrote it already."""
        eos, written = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        if ids[-2:] == [eos, eos] and text.endswith(written) and not text.endswith(written + written):
            return ids[:-1]
        return ids if ids and ids[-1] == eos else [*ids, eos]


def _chat(encoding: Any, text: str, spans: list[Span]) -> Rendered:
    trained_T = np.zeros(len(encoding.ids), np.bool_)
    for begin, end in spans:
        trained_T[_token_at(encoding, begin, text) : _token_at(encoding, end, text)] = True
    return Rendered(ids_T=np.array(encoding.ids, np.int32), trained_T=trained_T)


def _token_at(encoding: Any, char: int, text: str) -> int:
    """Return the first token that covers `char`, or a later character when none does (dropped white space)."""
    for position in range(char, len(text)):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return len(encoding.ids)


def valid(text: str) -> str:
    """Return `text` if it can be encoded.

    Raises:
        RowError: it holds half of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"not valid text: lone surrogate \\u{ord(text[error.start]):04x}") from None
    return text
