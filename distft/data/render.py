"""Samples -> token ids and a mask of the trained ones. The only file of the room that knows transformers.

Shape letter: T tokens of one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distft.core import hub
from distft.core.errors import DataError
from distft.data.boundaries import ByteLengths, byte_lengths
from distft.data.samples import Conversation, Message, PromptCompletion, RowError, Sample, Text
from distft.data.templates import BUILT_IN, read_template
from distft.data.turns import ChatTemplate, LossOn, Span, has_marks

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Everything that decides how text becomes ids; weights are not among them."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One sample as tokens."""

    ids_T: np.ndarray
    """int32."""
    trained_T: np.ndarray
    """bool; the tokens to be predicted. The first token is never a label, whatever this says."""
    diverged: bool = False
    """The prompt's tokens alone are not the first tokens of prompt + completion: they merge at the boundary."""


def tokenizer_folder(path: str, revision: str | None = None) -> Path:
    """The folder with the tokenizer's files; those of a hub id are fetched or found in the hub's cache.

    Raises:
        DataError: there is no such folder or hub id, or it holds no tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        wanted = [*TOKENIZER_FILES, "config.json"]
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


def load_renderer(
    path: str | Path, *, chat_template: str = "auto", loss_on: LossOn = "assistant", revision: str | None = None
) -> Renderer:
    """The renderer of a tokenizer (a folder or hub id).

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
    return Renderer(path=str(path), tokenizer=tokenizer, chat_template=chat_template, loss_on=loss_on)


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

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; looked up when the first chat comes, so that raw text needs none.

        Raises:
            DataError: "auto", and the tokenizer has none.
        """
        text = read_template(self.chat_template)
        label = f'chat_template "{self.chat_template}"'
        if text is None:
            own = self.tokenizer.chat_template
            text = own.get("default") if isinstance(own, dict) else own
            label = f"the chat template of {self.path}"
            if not text:
                raise DataError(
                    f"tokenizer {self.path}: has no chat template  set [data] chat_template to one of "
                    f"{', '.join(BUILT_IN)}, or to a .jinja file"
                )
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        tokens.add(self.tokenizer.eos_token)
        return ChatTemplate(label, text, _Drawing(self.tokenizer, text), tuple(sorted(tokens)))

    def render(self, sample: Sample) -> Rendered:
        """One sample. See `render_many`.

        Raises:
            RowError: this sample cannot be rendered.
            DataError: the chat template cannot be used, or not for this sample.
        """
        (rendered,) = self.render_many([sample])
        if isinstance(rendered, Exception):
            raise rendered
        return rendered

    def render_many(self, samples: Sequence[Sample]) -> list[Rendered | RowError | DataError]:
        """Samples in order; in the place of one that cannot be rendered, why: its own fault or the chat template's.

        Tokenised in one batch, which the tokenizer spreads over its threads. Chats are tokenised as their template
        wrote them: it decides about a begin-of-sequence token, as it does at inference. Raw text gets the special
        tokens that the tokenizer adds by itself, and end-of-sequence unless it is there already.

        Raises:
            DataError: the chat template cannot be used for any chat.
        """
        if any(isinstance(sample, Conversation) for sample in samples):
            self.template.refuse_without_stop()
        plain: list[str] = []  # raw text; a prompt takes two entries, itself and prompt + completion
        chats: list[str] = []
        spans: list[list[Span]] = []
        faults: dict[int, RowError | DataError] = {}
        for index, sample in enumerate(samples):
            try:
                if isinstance(sample, Conversation):
                    text, wanted = self.template.trained(sample, self.loss_on)
                    chats.append(_valid(text))
                    spans.append(wanted)
                elif isinstance(sample, PromptCompletion):
                    plain += [_valid(sample.prompt), _valid(sample.prompt + sample.completion)]
                else:
                    plain.append(_valid(sample.text))
            except (RowError, DataError) as error:
                faults[index] = error
        backend = self.tokenizer.backend_tokenizer
        plain_ids = iter([encoding.ids for encoding in backend.encode_batch_fast(plain, add_special_tokens=True)])
        rendered_chats = iter(self._chats(chats, spans))
        rendered: list[Rendered | RowError | DataError] = []
        for index, sample in enumerate(samples):
            if index in faults:
                rendered.append(faults[index])
            elif isinstance(sample, Conversation):
                rendered.append(next(rendered_chats))
            elif isinstance(sample, PromptCompletion):
                rendered.append(self._prompt_completion(next(plain_ids), next(plain_ids), sample))
            else:
                rendered.append(self._text(next(plain_ids)))
        return rendered

    def _chats(self, texts: Sequence[str], spans: Sequence[list[Span]]) -> list[Rendered]:
        """Chats as tokens, in order, those in a span trained."""
        backend, lengths = self.tokenizer.backend_tokenizer, self._byte_lengths
        told = [lengths is not None and lengths.can_tell(text, own) for text, own in zip(texts, spans, strict=True)]
        quick = iter(
            backend.encode_batch_fast(list(itertools.compress(texts, told)), add_special_tokens=False)
            if lengths is not None
            else ()
        )
        found: list[Rendered | None] = []
        for text, own, is_told in zip(texts, spans, told, strict=True):
            ids_T = np.array(next(quick).ids, np.int32) if is_told else None
            trained_T = None if ids_T is None or lengths is None else lengths.trained(ids_T, text, own)
            found.append(None if ids_T is None or trained_T is None else Rendered(ids_T=ids_T, trained_T=trained_T))
        left = [at for at, one in enumerate(found) if one is None]
        asked = backend.encode_batch([texts[at] for at in left], add_special_tokens=False)
        for at, encoding in zip(left, asked, strict=True):
            found[at] = _chat(encoding, texts[at], spans[at])
        return [one for one in found if one is not None]

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
            self.template.refuse_without_stop()
            asked = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
            text, _ = self.template.draw(asked, sample.tools, True)
            ids = backend.encode(_valid(text), add_special_tokens=False).ids
        elif isinstance(sample, PromptCompletion):
            text = _valid(sample.prompt)
            ids = backend.encode(text, add_special_tokens=True).ids
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
        ids = self._without_added_eos(backend.encode(whole, add_special_tokens=not as_chat).ids, whole)
        before = self._without_added_eos(backend.encode(bare, add_special_tokens=not as_chat).ids, bare) if bare else []
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

    def _text(self, ids: list[int]) -> Rendered:
        ids = self._with_eos(ids)
        return Rendered(ids_T=np.array(ids, np.int32), trained_T=np.ones(len(ids), np.bool_))

    def _prompt_completion(self, prompt: list[int], joint: list[int], sample: PromptCompletion) -> Rendered:
        """The completion starts where the prompt's tokens and the joint ones part, as in TRL 1.16's SFTTrainer."""
        ids = self._with_eos(joint)
        prompt = self._without_added_eos(prompt, sample.prompt)
        shared = len(prompt)
        if ids[:shared] != prompt:  # seldom; comparing whole is a tenth of the time of comparing one by one
            shared = next(
                (at for at, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
            )
        trained_T = np.ones(len(ids), np.bool_)
        if self.loss_on != "all":
            trained_T[:shared] = False
        return Rendered(ids_T=np.array(ids, np.int32), trained_T=trained_T, diverged=shared < len(prompt))

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]


class _Drawing:
    """Renders a Jinja chat template with a tokenizer's special tokens, as `apply_chat_template` does."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        self.marked = has_marks(text)
        self.special = dict(tokenizer.special_tokens_map)

    def __call__(self, messages: Sequence[Message], tools: Any, open_turn: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            drawn: Any = render_jinja_template(
                conversations=[list(messages)],
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
    """Whether there is nothing to learn from: no text, or no completion."""
    if isinstance(sample, Text):
        return not sample.text
    return isinstance(sample, PromptCompletion) and not sample.completion


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
