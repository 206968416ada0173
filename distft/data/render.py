"""Samples -> token ids and a mask of the trained ones. The only file of the room that knows transformers.

Shape letter: T tokens of one sample.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distft.core import hub
from distft.core.errors import DataError
from distft.data.boundaries import ByteLengths, byte_lengths
from distft.data.control import MARKED, TYPED, Typed, control_tokens, kept_text, without_marks
from distft.data.samples import Conversation, Message, PromptCompletion, RowError, Sample, Text
from distft.data.templates import BUILT_IN, read_template
from distft.data.turns import ChatTemplate, Drawn, LossOn, Span, has_marks

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Everything that decides how text becomes ids; weights are not among them."""
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
"""Chat templates with a name of their own, such as "tool_use"."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One sample as tokens."""

    ids_T: np.ndarray
    """int32."""
    trained_T: np.ndarray
    """bool; the tokens to be predicted. The first token is never a label, whatever this says."""
    diverged: bool = False
    """The prompt's tokens alone are not the first tokens of prompt + completion: they merge at the boundary."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What is to be known of the row: kind -> an example."""
    empty: bool = False
    """There is nothing to learn: the answers are empty."""
    stop_id: int = -1
    """The trained token that ends the answer; -1: none."""


APART = "answers whose first characters merge with the template's header: tokenised apart, as they will be generated"


def tokenizer_folder(path: str, revision: str | None = None) -> Path:
    """The folder with the tokenizer's files; those of a hub id are fetched or found in the hub's cache.

    Raises:
        DataError: there is no such folder or hub id, or it holds no tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        wanted = [*TOKENIZER_FILES, MORE_TEMPLATES, "config.json"]
        try:
            folder = hub.snapshot(path, revision, wanted)
        except Exception as error:  # the hub library raises many kinds; all mean: no tokenizer
            raise DataError(
                f"tokenizer {path}: neither a folder here nor a model that the hub gives: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DataError(f"tokenizer {path}: the folder holds no tokenizer.json")
    return folder


_NEAR_CHARS = 256
"""Before a trained turn, in which most templates write an added token."""


def settings_of(table: DataTable) -> dict[str, Any]:
    """What a recipe's [data] says to `load_renderer`."""
    return {
        "chat_template": table.chat_template,
        "loss_on": table.loss_on,
        "typed": table.special_tokens_in_content,
        "date": table.date,
        "merge_turns": table.merge_turns,
    }


def load_renderer(
    path: str | Path,
    *,
    chat_template: str = "auto",
    loss_on: LossOn = "assistant",
    revision: str | None = None,
    typed: Typed = "escape",
    date: str | None = None,
    merge_turns: bool = False,
) -> Renderer:
    """The renderer of a tokenizer (a folder or hub id).

    Args:
        path: of the tokenizer.
        chat_template: "auto", a built-in name, or a .jinja file.
        loss_on: which turns are trained.
        revision: pins a hub id.
        typed: what becomes of special tokens inside messages.
        date: YYYY-MM-DD, for templates that ask for it; today's unless set.
        merge_turns: whoever reads rows for this renderer joins neighbouring turns of one role.

    Raises:
        DataError: the tokenizer cannot be loaded, runs remote code, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(str(path), revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer file makes the library raise
        raise DataError(f"tokenizer {path}: cannot be loaded: {type(error).__name__}: {error}") from None
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {path}: has no fast form (tokenizer.json), which the loss mask needs")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {path}: has no end-of-sequence token, so a model trained with it would not stop  "
            'name it as "eos_token" in tokenizer_config.json'
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may carry both; cutting is this room's business
    backend.no_padding()
    return Renderer(
        path=str(path),
        tokenizer=tokenizer,
        chat_template=chat_template,
        loss_on=loss_on,
        typed=typed,
        date=date,
        merge_turns=merge_turns,
    )


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Turns samples into tokens; made in each process by `load_renderer`."""

    path: str
    """Where the tokenizer came from, for messages."""
    tokenizer: Any
    """A fast transformers tokenizer."""
    chat_template: str
    """"auto", a built-in name, or a .jinja file."""
    loss_on: LossOn
    typed: Typed = "escape"
    """What becomes of special tokens inside messages."""
    date: str | None = None
    """YYYY-MM-DD, for templates that ask for the date; None: today's."""
    merge_turns: bool = False
    """Neighbouring turns of one role are joined when rows are read."""

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; looked up when the first chat comes, so that raw text needs none.

        Raises:
            DataError: "auto", and the tokenizer has none.
        """
        text = read_template(self.chat_template)
        label = f'chat_template "{self.chat_template}"'
        if text is None:
            text = self._own_templates.get("default")
            label = f"the chat template of {self.path}"
            if not text:
                raise DataError(
                    f"tokenizer {self.path}: has no chat template  set [data] chat_template to one of "
                    f"{', '.join(BUILT_IN)}, or to a .jinja file"
                )
        return self._bound(label, text)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        """For chats with tools: the tokenizer's own template "tool_use", where it has one, as in transformers."""
        text = self._own_templates.get("tool_use") if read_template(self.chat_template) is None else None
        return self._bound(f'the chat template "tool_use" of {self.path}', text) if text else self.template

    @property
    def _own_templates(self) -> dict[str, str]:
        own = self.tokenizer.chat_template
        return own if isinstance(own, dict) else {"default": own} if own else {}

    def _bound(self, label: str, text: str) -> ChatTemplate:
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        tokens.add(self.tokenizer.eos_token)
        return ChatTemplate(label, text, _Drawing(self.tokenizer, text, self.date), tuple(sorted(tokens)))

    def _template_of(self, chat: Conversation) -> ChatTemplate:
        template = self._tool_template if chat.tools else self.template
        template.refuse_without_stop()
        return template

    @cached_property
    def _added(self) -> dict[str, bool]:
        """Added tokens as text, and whether each is special."""
        added = {token.content: bool(token.special) for token in self.tokenizer.added_tokens_decoder.values()}
        return added | {token: True for token in (self.tokenizer.bos_token, self.tokenizer.eos_token) if token}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Tokens that only the chat template may write."""
        return control_tokens(self._added, self.template.text + self._tool_template.text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Special tokens, for raw text."""
        return control_tokens(self._added, "")

    def render(self, sample: Sample) -> Rendered:
        """One sample that is one row. See `render_many`.

        Raises:
            RowError: this sample cannot be rendered.
            DataError: the chat template cannot be used, or not for this sample.
        """
        (rendered,) = self.render_many([sample])
        if isinstance(rendered, Exception):
            raise rendered
        return rendered

    def render_many(self, samples: Sequence[Sample]) -> list[Rendered | RowError | DataError]:
        """Samples that are one row each, in order. See `render_rows`."""
        rows = self.render_rows(samples)
        return [one if isinstance(one, Exception) else _only(one) for one in rows]

    def render_rows(self, samples: Sequence[Sample]) -> list[list[Rendered] | RowError | DataError]:
        """The rows of each sample, in order; for one that cannot be rendered, why: its own fault or the template's.

        A sample is several rows where a chat template makes its turns rows of their own.
        Tokenised in one batch, which the tokenizer spreads over its threads. Chats are tokenised as their template
        wrote them: it decides about a begin-of-sequence token, as it does at inference. Raw text gets the special
        tokens that the tokenizer adds by itself, and end-of-sequence unless it is there already.

        Raises:
            DataError: the chat template cannot be used for any chat.
        """
        for chat in samples:
            if isinstance(chat, Conversation):
                self._template_of(chat)
        plain: list[str] = []  # raw text; a prompt takes two entries, itself and prompt + completion
        drawn: dict[int, list[Drawn]] = {}
        notes: dict[int, dict[str, str]] = {}
        faults: dict[int, RowError | DataError] = {}
        for index, sample in enumerate(samples):
            try:
                if isinstance(sample, Conversation):
                    drawn[index] = self._drawn(sample)
                    continue
                parts = (
                    [sample.prompt, sample.prompt + sample.completion]
                    if isinstance(sample, PromptCompletion)
                    else [sample.text]
                )
                notes[index] = self._typed_raw(parts[-1])
                plain += [_valid(part) for part in parts]
            except (RowError, DataError) as error:
                faults[index] = error
        backend = self.tokenizer.backend_tokenizer
        plain_ids = iter([encoding.ids for encoding in backend.encode_batch_fast(plain, add_special_tokens=True)])
        rendered_chats = iter(self._chats([one for many in drawn.values() for one in many]))
        rendered: list[list[Rendered] | RowError | DataError] = []
        for index, sample in enumerate(samples):
            if index in faults:
                rendered.append(faults[index])
            elif isinstance(sample, Conversation):
                rendered.append([next(rendered_chats) for _ in drawn[index]])
            elif isinstance(sample, PromptCompletion):
                rendered.append([self._prompt_completion(next(plain_ids), next(plain_ids), sample, notes[index])])
            else:
                rendered.append([self._text(next(plain_ids), sample.text, notes[index])])
        return rendered

    def _drawn(self, chat: Conversation) -> list[Drawn]:
        """A chat as its rows' texts; special tokens typed in it stand between marks.

        Raises:
            RowError, DataError: as `ChatTemplate.trained`.
        """
        chat, typed = kept_text(chat, self._control, self.typed)
        rows = self._template_of(chat).trained(chat, self.loss_on)
        for row in rows:
            for match in MARKED.finditer(_valid(row.text)):
                if match[1] is not None:
                    self._as_text(match[1], first=match.start() == 0)  # now, while it is this row's fault
        if typed:
            rows[0].notes.update(typed)
        return rows

    def _typed_raw(self, text: str) -> dict[str, str]:
        """Special tokens in raw text, which no template protects: they are tokens, and counted.

        Raises:
            RowError: there are some, and they are to be an error.
        """
        body = text.removesuffix(self.tokenizer.eos_token)
        body = body.removeprefix(self.tokenizer.bos_token) if self.tokenizer.bos_token else body
        found = self._special.search(body)
        if found is None:
            return {}
        if self.typed == "error":
            raise RowError(
                f"the special token {found.group()} is typed inside raw text, where it is the token  [data] "
                'special_tokens_in_content = "allow" lets it be'
            )
        return {TYPED.format("read as tokens").replace("a message", "raw text"): found.group()}

    def _chats(self, drawn: Sequence[Drawn]) -> list[Rendered]:
        """Chats as tokens, in order, those in a span trained."""
        backend, lengths = self.tokenizer.backend_tokenizer, self._byte_lengths
        found: list[Rendered | None] = [self._apart(one) if MARKED.search(one.text) else None for one in drawn]
        todo = [at for at, one in enumerate(found) if one is None]
        if lengths is not None:
            told = [at for at in todo if lengths.can_tell(drawn[at].text, drawn[at].spans)]
            encoded = backend.encode_batch_fast([drawn[at].text for at in told], add_special_tokens=False)
            for at, encoding in zip(told, encoded, strict=True):
                ids_T = np.array(encoding.ids, np.int32)
                trained_T = lengths.trained(ids_T, drawn[at].text, drawn[at].spans)
                if trained_T is not None:
                    found[at] = self._as_asked(self._rendered(drawn[at], ids_T, trained_T), drawn[at])
            todo = [at for at in todo if found[at] is None]
        asked = backend.encode_batch([drawn[at].text for at in todo], add_special_tokens=False)
        for at, encoding in zip(todo, asked, strict=True):
            found[at] = self._by_offsets(encoding, drawn[at])
        return [one for one in found if one is not None]

    def _rendered(
        self, drawn: Drawn, ids_T: np.ndarray, trained_T: np.ndarray, notes: Mapping[str, str] | None = None
    ) -> Rendered:
        """A chat's row. Its last trained token ends its answer; where all is trained, the template says what does."""
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
        """As the tokenizer says which characters a token covers; apart where one covers both header and answer."""
        for begin, _ in drawn.spans:
            if self._merges(encoding, _token_at(encoding, begin, drawn.text), begin, drawn.text):
                return self._apart(drawn, merged=True)
        told = _chat(encoding, drawn.text, drawn.spans)
        row = self._rendered(drawn, told.ids_T, told.trained_T)
        return row if self._byte_lengths is None else self._as_asked(row, drawn)

    def _as_asked(self, row: Rendered, drawn: Drawn) -> Rendered:
        """The row, if the tokens before each trained turn are those of the prompt alone; else tokenised apart.

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
        """Whether the first token of a span begins before it; offsets may leave out the space that it begins with."""
        if not 0 < begin < len(text) or first >= len(encoding.ids):
            return False
        if encoding.offsets[first][0] < begin:
            return True
        if " " not in text[begin - 1 : begin + 1]:
            return False
        alone = self.tokenizer.backend_tokenizer.encode(text[:begin], add_special_tokens=False).ids
        return alone != encoding.ids[:first]

    def _apart(self, drawn: Drawn, *, merged: bool = False) -> Rendered:
        """Tokenised piece by piece, cut where training starts and around special tokens that stay text."""
        text, begins = drawn.text, {begin for begin, _ in drawn.spans}
        typed = {match.span(): match for match in MARKED.finditer(text)}
        cuts = sorted({0, len(text), *begins, *(end for _, end in drawn.spans), *(at for span in typed for at in span)})
        ids: list[int] = []
        trained: list[bool] = []
        for begin, end in itertools.pairwise(cuts):
            match = typed.get((begin, end))
            if match is None:
                own = self._piece(text[begin:end], first=begin == 0)
            else:
                own = [] if match[1] is None else self._as_text(match[1], first=begin == 0)
            ids += own
            trained += [any(first <= begin and end <= last for first, last in drawn.spans)] * len(own)
        notes = {APART: ""} if merged else {}
        return self._rendered(drawn, np.array(ids, np.int32), np.array(trained, np.bool_), notes)

    def _piece(self, text: str, *, first: bool) -> list[int]:
        """A piece of a text as tokens; behind a line break, or some tokenizers would put a space before it."""
        encode = self.tokenizer.backend_tokenizer.encode
        if first or self._byte_lengths is not None:
            return encode(text, add_special_tokens=False).ids
        head = encode("\n", add_special_tokens=False).ids
        ids = encode("\n" + text, add_special_tokens=False).ids
        return ids[len(head) :] if ids[: len(head)] == head else encode(text, add_special_tokens=False).ids

    def _as_text(self, token: str, *, first: bool) -> list[int]:
        """What a special token's name is as text: the tokenizer's steps without its added tokens.

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
            else [one for one, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for split in splits for token in backend.model.tokenize(split)]

    @cached_property
    def _byte_lengths(self) -> ByteLengths | None:
        return byte_lengths(self.tokenizer.backend_tokenizer)

    def ask(self, sample: Sample) -> tuple[str, list[int]]:
        """The sample without its last answer, as text and as the tokens that answer would follow in training.

        A raw prompt is tokenised by itself, as at inference: where its last token would merge with the completion's
        first (`Rendered.diverged`), training saw that one token instead.

        Raises:
            RowError: it is plain text, which asks nothing, or its prompt is empty or cannot be rendered.
            DataError: the chat template cannot be used.
        """
        backend = self.tokenizer.backend_tokenizer
        if isinstance(sample, Conversation):
            template = self._template_of(sample)
            chat, _ = kept_text(sample, self._control, self.typed)
            asked = chat.messages[:-1] if chat.messages[-1]["role"] == "assistant" else chat.messages
            text, _ = template.draw(asked, chat.tools, True)
            if MARKED.search(_valid(text)):
                ids = self._apart(Drawn(text=text, spans=[])).ids_T.tolist()
                text = without_marks(text)
            else:
                ids = backend.encode(text, add_special_tokens=False).ids
        elif isinstance(sample, PromptCompletion):
            text = _valid(sample.prompt)
            ids = self._one_start(backend.encode(text, add_special_tokens=True).ids, text)
            ids = self._without_added_eos(ids, text)
        else:
            raise RowError("plain text asks nothing: only its loss can be measured")
        if not ids:
            raise RowError("the prompt is empty, and this tokenizer starts a text with no token of its own")
        return text, ids

    def pair(
        self, context: str, continuation: str, *, as_chat: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both as tokens, tokenised together: what follows the context's own tokens is the continuation.

        White space that ends the context goes over to the continuation, where tokenizers keep it, and an empty
        context is the token that starts a text: as in lm-eval (`TemplateLM._encode_pair`). `as_chat`: a template has
        written the context, with its special tokens and the white space that the answer follows.
        """
        bare, whole = context if as_chat else context.rstrip(), context + continuation
        backend = self.tokenizer.backend_tokenizer

        def encoded(text: str) -> list[int]:
            ids = backend.encode(text, add_special_tokens=not as_chat).ids
            return self._without_added_eos(self._one_start(ids, text), text)

        ids, before = encoded(whole), encoded(bare) if bare else []
        if not before:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            before, ids = [start], ids if ids[:1] == [start] else [start, *ids]
        at = min(len(before), len(ids) - 1)
        return tuple(ids[:at]), tuple(ids[at:])

    def tokens(self, text: str, *, as_chat: bool = False) -> list[int]:
        """A prompt in words, as `ask` would tokenise it; `as_chat`: a template has written it, special tokens too.

        Raises:
            RowError: it is empty, and no token of its own starts a text.
        """
        if not as_chat:
            return self.ask(PromptCompletion(prompt=text, completion=""))[1]
        return self.tokenizer.backend_tokenizer.encode(_valid(text), add_special_tokens=False).ids

    def draw(self, messages: Sequence[Message], *, open_turn: bool) -> str:
        """A chat as the template writes it; `open_turn`: up to where the assistant would answer.

        Raises:
            RowError: the template refuses it.
            DataError: the chat template cannot be used.
        """
        self.template.refuse_without_stop()
        return self.template.draw(messages, None, open_turn)[0]

    def write(self, ids: list[int]) -> str:
        """Tokens of an answer as text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _without_added_eos(self, ids: list[int], text: str) -> list[int]:
        """A tokenizer may append end-of-sequence by itself."""
        added = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token)
        return ids[:-1] if added else ids

    def _one_start(self, ids: list[int], text: str) -> list[int]:
        """Begin-of-sequence once, where the text writes it and the tokenizer adds it too."""
        start = self.tokenizer.bos_token_id
        typed = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        doubled = typed and ids[:2] == [start, start] and ids[:3] != [start, start, start]
        return ids[1:] if doubled else ids

    def _text(self, ids: list[int], text: str, notes: dict[str, str]) -> Rendered:
        ids = self._with_eos(self._one_start(ids, text), text)
        return Rendered(
            ids_T=np.array(ids, np.int32), trained_T=np.ones(len(ids), np.bool_), notes=notes, stop_id=ids[-1]
        )

    def _prompt_completion(
        self, prompt: list[int], joint: list[int], sample: PromptCompletion, notes: dict[str, str]
    ) -> Rendered:
        """The completion starts where the prompt's tokens and the joint ones part, as in TRL 1.16's SFTTrainer."""
        whole = sample.prompt + sample.completion
        ids = self._with_eos(self._one_start(joint, whole), whole)
        prompt = self._without_added_eos(self._one_start(prompt, sample.prompt), sample.prompt)
        shared = len(prompt)
        if ids[:shared] != prompt:  # seldom; comparing whole is a tenth of the time of comparing one by one
            shared = next(
                (at for at, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
            )
        trained_T = np.ones(len(ids), np.bool_)
        if self.loss_on != "all":
            trained_T[:shared] = False
        diverged = shared < len(prompt)
        ids_T = np.array(ids, np.int32)
        return Rendered(ids_T=ids_T, trained_T=trained_T, diverged=diverged, notes=notes, stop_id=ids[-1])

    def _with_eos(self, ids: list[int], text: str) -> list[int]:
        """End-of-sequence once: added, or not where the text or the tokenizer wrote it already."""
        eos, written = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        if ids[-2:] == [eos, eos] and text.endswith(written) and not text.endswith(written + written):
            return ids[:-1]
        return ids if ids and ids[-1] == eos else [*ids, eos]


class _Drawing:
    """Renders a Jinja chat template with a tokenizer's special tokens, as `apply_chat_template` does."""

    def __init__(self, tokenizer: Any, text: str, date: str | None) -> None:
        self.text = text
        self.marked = has_marks(text)
        self.special = dict(tokenizer.special_tokens_map)
        self._thoughts = tuple(name for name in ("thinking", "reasoning") if re.search(rf"\b{name}\b", text))
        self._date = None if date is None else datetime.datetime.fromisoformat(date)

    def __call__(self, messages: Sequence[Message], tools: Any, open_turn: bool) -> tuple[str, list[Span]]:
        written = [self._written(message) for message in messages]
        return self._draw(written, tools, open_turn)

    def _written(self, message: Message) -> Message:
        """A message as templates read it: reasoning under every name they know, arguments as they want them."""
        if message.keys() <= {"role", "content"}:
            return message
        written = {key: value for key, value in message.items() if key != "trained"}
        if "reasoning_content" in message:
            written |= dict.fromkeys(self._thoughts, message["reasoning_content"])
        if "tool_calls" in message:
            if self._wants_text:
                written["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if not message["content"] and self._takes_null:
                written["content"] = None
        return written

    @cached_property
    def _wants_text(self) -> bool:
        """Whether arguments must be JSON text: as an object the template refuses them, or prints Python's notation."""
        as_object = self._called("", _CALL)
        if "Oslo" in as_object and "{'place'" not in as_object:
            return False
        return '"place": "Oslo"' in self._called("", _with_text_arguments(_CALL))

    @cached_property
    def _takes_null(self) -> bool:
        """Whether a call without text has no content, as APIs have it: for "" R1's template writes one turn more."""
        drawn = self._called(None, _with_text_arguments(_CALL) if self._wants_text else _CALL)
        return "Oslo" in drawn and "None" not in drawn

    def _called(self, content: str | None, call: dict[str, Any]) -> str:
        """A chat that ends with a call; "" if the template refuses it."""
        asked: Message = {"role": "user", "content": "where"}
        try:
            return self._draw([asked, {"role": "assistant", "content": content, "tool_calls": [call]}], None, False)[0]
        except RowError:
            return ""

    def _draw(self, messages: list[Message], tools: Any, open_turn: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            self._freeze_date()
            drawn: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=open_turn,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses it: {error}") from None
        (text,), (marks,) = drawn if self.marked else (drawn[0], [[]])
        return text, marks

    def _freeze_date(self) -> None:
        """Let the template's `strftime_now` give one date, or a run would train on other rows every day.

        transformers takes no clock (5.23): its compiled template, kept by its text, is given another one.
        """
        if "strftime_now" not in self.text:
            return
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(self.text).environment.globals["strftime_now"] = (
            self._date or datetime.datetime.now()
        ).strftime


_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": {"place": "Oslo"}}}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _only(rows: list[Rendered]) -> Rendered:
    assert len(rows) == 1, "its turns are rows of their own: ask render_rows"
    return rows[0]


def _chat(encoding: Any, text: str, spans: list[Span]) -> Rendered:
    trained_T = np.zeros(len(encoding.ids), np.bool_)
    for begin, end in spans:
        trained_T[_token_at(encoding, begin, text) : _token_at(encoding, end, text)] = True
    return Rendered(ids_T=np.array(encoding.ids, np.int32), trained_T=trained_T)


def _token_at(encoding: Any, char: int, text: str) -> int:
    """The first token that covers `char`, or a later character when no token does (white space a tokenizer drops)."""
    for at in range(char, len(text)):
        token = encoding.char_to_token(at)
        if token is not None:
            return token
    return len(encoding.ids)


def _valid(text: str) -> str:
    """`text` if it can be encoded.

    Raises:
        RowError: it holds half of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"not valid text: lone surrogate \\u{ord(text[error.start]):04x}") from None
    return text


def is_empty(sample: Sample) -> bool:
    """Whether there is nothing to learn from: no text but white space, or no completion."""
    if isinstance(sample, Text):
        return not sample.text.strip()
    return isinstance(sample, PromptCompletion) and not sample.completion.strip()


def load_decoder(path: str, revision: str | None = None) -> Callable[[list[int]], str]:
    """Ids -> text with special tokens shown; without transformers where the tokenizer has its fast form.

    Raises:
        DataError: as `load_renderer`.
    """
    file = tokenizer_folder(path, revision) / "tokenizer.json"
    if not file.is_file():
        return load_renderer(path, revision=revision).tokenizer.decode
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def save_tokenizer(path: str, folder: Path, *, chat_template: str = "auto", revision: str | None = None) -> None:
    """Write the tokenizer into `folder`, with the chat template that the model was trained on."""
    tokenizer = load_renderer(path, revision=revision).tokenizer
    if (text := read_template(chat_template)) is not None:
        tokenizer.chat_template = text
    tokenizer.save_pretrained(folder)
