"""Samples -> token ids and a mask of the trained ones.

Shape letter: T tokens of one sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distft.core.errors import DataError
from distft.core.virtual_tokens import virtual_ids
from distft.data.chat_rendering import TemplateDrawing
from distft.data.chat_template import ChatTemplate, Drawn, LossOn
from distft.data.encoding import Encoder, Rendered, valid
from distft.data.samples import Conversation, Document, Group, Message, PromptCompletion, RowError, Sample, Text
from distft.data.special_tokens import MARKED, TYPED, Typed, control_tokens, kept_text, without_marks
from distft.data.templates import BUILT_IN, read_template
from distft.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable


def settings_of(table: DataTable) -> dict[str, Any]:
    """Return what a recipe's [data] says to `load_renderer`."""
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
    virtual_tokens: int = 0,
) -> Renderer:
    """Return the renderer of a tokenizer (a folder or hub id).

    Args:
        path: of the tokenizer.
        chat_template: "auto", a built-in name, or a .jinja file.
        loss_on: which turns are trained.
        revision: pins a hub id.
        typed: what becomes of special tokens inside messages.
        date: YYYY-MM-DD, for templates that ask for it; today's unless set.
        merge_turns: whoever reads rows for this renderer joins neighbouring turns of one role.
        virtual_tokens: stand before every document and every prompt.

    Raises:
        DataError: the tokenizer cannot be loaded, runs remote code, or has no end-of-sequence token.
    """
    tokenizer = load_tokenizer(path, revision)
    return Renderer(
        path=str(path),
        tokenizer=tokenizer,
        chat_template=chat_template,
        loss_on=loss_on,
        typed=typed,
        date=date,
        merge_turns=merge_turns,
        prefix=virtual_ids(virtual_tokens),
    )


@dataclass(frozen=True, kw_only=True)
class Renderer(Encoder):
    """Turns samples into tokens; made in each process by `load_renderer`."""

    path: str
    """Where the tokenizer came from, for messages."""
    chat_template: str
    """"auto", a built-in name, or a .jinja file."""
    typed: Typed = "escape"
    """What becomes of special tokens inside messages."""
    date: str | None = None
    """YYYY-MM-DD, for templates that ask for the date; None: today's."""
    merge_turns: bool = False
    """Neighbouring turns of one role are joined when rows are read."""
    prefix: tuple[int, ...] = ()
    """Ids that every document and every prompt begins with: a method's virtual tokens."""

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
        templates = self.tokenizer.chat_template
        return templates if isinstance(templates, dict) else {"default": templates} if templates else {}

    def _bound(self, label: str, text: str) -> ChatTemplate:
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        tokens.add(self.tokenizer.eos_token)
        return ChatTemplate(label, text, TemplateDrawing(self.tokenizer, text, self.date), tuple(sorted(tokens)))

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

    def render(self, sample: Document) -> Rendered:
        """Render one sample that is one row. See `render_many`.

        Raises:
            RowError: this sample cannot be rendered.
            DataError: the chat template cannot be used, or not for this sample.
        """
        (rendered,) = self.render_many([sample])
        if isinstance(rendered, Exception):
            raise rendered
        return rendered

    def render_many(self, samples: Sequence[Document]) -> list[Rendered | RowError | DataError]:
        """Render samples that are one row each, in order. See `render_rows`."""
        rows = self.render_rows(samples)
        return [
            rows_or_error if isinstance(rows_or_error, Exception) else _only(rows_or_error) for rows_or_error in rows
        ]

    def render_rows(self, samples: Sequence[Document]) -> list[list[Rendered] | RowError | DataError]:
        """Render the rows of each sample, in order; one that cannot be rendered gives its error, or the template's.

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
                plain += [valid(part) for part in parts]
            except (RowError, DataError) as error:
                faults[index] = error
        backend = self.tokenizer.backend_tokenizer
        plain_ids = iter([encoding.ids for encoding in backend.encode_batch_fast(plain, add_special_tokens=True)])
        rendered_chats = iter(self._chats([chat for many in drawn.values() for chat in many]))
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
        if not self.prefix:
            return rendered
        return [rows if isinstance(rows, Exception) else [row.after(self.prefix) for row in rows] for rows in rendered]

    def _drawn(self, chat: Conversation) -> list[Drawn]:
        """Return a chat as its rows' texts; special tokens typed in it stand between marks.

        Raises:
            RowError, DataError: as `ChatTemplate.trained`.
        """
        chat, typed = kept_text(chat, self._control, self.typed)
        rows = self._template_of(chat).trained(chat, self.loss_on)
        for row in rows:
            for match in MARKED.finditer(valid(row.text)):
                if match[1] is not None:
                    self._as_text(match[1], first=match.start() == 0)  # now, while it is this row's fault
        if typed:
            rows[0].notes.update(typed)
        return rows

    def _typed_raw(self, text: str) -> dict[str, str]:
        """Count special tokens in raw text, which no template protects: they are read as tokens.

        Raises:
            RowError: there are some, and they are to be an error.
        """
        body = text.removesuffix(self.tokenizer.eos_token)
        body = body.removeprefix(self.tokenizer.bos_token) if self.tokenizer.bos_token else body
        match = self._special.search(body)
        if match is None:
            return {}
        if self.typed == "error":
            raise RowError(
                f"the special token {match.group()} is typed inside raw text, where it is the token  [data] "
                'special_tokens_in_content = "allow" lets it be'
            )
        return {TYPED.format("read as tokens").replace("a message", "raw text"): match.group()}

    def ask(self, sample: Sample) -> tuple[str, list[int]]:
        """Return the sample without its last answer, as text and as the tokens that the answer follows in training.

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
            messages = chat.messages[:-1] if chat.messages[-1]["role"] == "assistant" else chat.messages
            text, _ = template.draw(messages, chat.tools, True)
            if MARKED.search(valid(text)):
                ids = self._apart(Drawn(text=text, spans=[])).ids_T.tolist()
                text = without_marks(text)
            else:
                ids = backend.encode(text, add_special_tokens=False).ids
        elif isinstance(sample, PromptCompletion):
            text = valid(sample.prompt)
            ids = self._one_start(backend.encode(text, add_special_tokens=True).ids, text)
            ids = self._without_added_eos(ids, text)
        elif isinstance(sample, Group):
            raise RowError("a row of several documents asks nothing: only its loss can be measured")
        else:
            raise RowError("plain text asks nothing: only its loss can be measured")
        if not ids:
            raise RowError("the prompt is empty, and this tokenizer starts a text with no token of its own")
        return text, [*self.prefix, *ids]

    def pair(
        self, context: str, continuation: str, *, as_chat: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokenise both together: what follows the context's own tokens is the continuation.

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
        split = min(len(before), len(ids) - 1)
        return (*self.prefix, *ids[:split]), tuple(ids[split:])

    def tokens(self, text: str, *, as_chat: bool = False) -> list[int]:
        """Tokenise a prompt as `ask` would; `as_chat`: a template has written it, special tokens too.

        Raises:
            RowError: it is empty, and no token of its own starts a text.
        """
        if not as_chat:
            return self.ask(PromptCompletion(prompt=text, completion=""))[1]
        ids = self.tokenizer.backend_tokenizer.encode(valid(text), add_special_tokens=False).ids
        return [*self.prefix, *ids]

    def draw(self, messages: Sequence[Message], *, open_turn: bool) -> str:
        """Return a chat as the template writes it; `open_turn`: up to where the assistant would answer.

        Raises:
            RowError: the template refuses it.
            DataError: the chat template cannot be used.
        """
        self.template.refuse_without_stop()
        return self.template.draw(messages, None, open_turn)[0]

    def write(self, ids: list[int]) -> str:
        """Decode the tokens of an answer, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _text(self, ids: list[int], text: str, notes: dict[str, str]) -> Rendered:
        ids = self._with_eos(self._one_start(ids, text), text)
        return Rendered(
            ids_T=np.array(ids, np.int32), trained_T=np.ones(len(ids), np.bool_), notes=notes, stop_id=ids[-1]
        )

    def _prompt_completion(
        self, prompt: list[int], joint: list[int], sample: PromptCompletion, notes: dict[str, str]
    ) -> Rendered:
        """Start the completion where the prompt's tokens and the joint ones part, as in TRL 1.16's SFTTrainer."""
        whole = sample.prompt + sample.completion
        ids = self._with_eos(self._one_start(joint, whole), whole)
        prompt = self._without_added_eos(self._one_start(prompt, sample.prompt), sample.prompt)
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
        return Rendered(ids_T=ids_T, trained_T=trained_T, diverged=diverged, notes=notes, stop_id=ids[-1])


def _only(rows: list[Rendered]) -> Rendered:
    assert len(rows) == 1, "its turns are rows of their own: ask render_rows"
    return rows[0]


def is_empty(sample: Sample) -> bool:
    """Return whether there is nothing to learn from: no text but white space, or no completion."""
    if isinstance(sample, Group):
        return any(map(is_empty, sample.documents))
    if isinstance(sample, Text):
        return not sample.text.strip()
    return isinstance(sample, PromptCompletion) and not sample.completion.strip()
