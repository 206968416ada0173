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

from distft.core.errors import DataError
from distft.core.tokenizer_files import load_tokenizer
from distft.core.virtual_tokens import virtual_ids
from distft.data.chat_rendering import TemplateDrawing
from distft.data.chat_template import ChatTemplate, LossOn
from distft.data.drafts import Drawn, RawText
from distft.data.encoding import Encoder, valid
from distft.data.rendered import Rendered
from distft.data.samples import Conversation, Document, Message, PromptCompletion, RowError, Sample
from distft.data.special_tokens import MARKED, TYPED, Typed, control_tokens, kept_text, without_marks
from distft.data.templates import BUILT_IN, read_template

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

    def render_rows(self, documents: Sequence[Document]) -> list[list[Rendered] | RowError | DataError]:
        """Render the rows of each sample, in order; one that cannot be rendered gives its error, or the template's.

        A sample is several rows where a chat template makes its turns rows of their own.
        Tokenised in one batch, which the tokenizer spreads over its threads. Chats are tokenised as their template
        wrote them: it decides about a begin-of-sequence token, as it does at inference. Raw text gets the special
        tokens that the tokenizer adds by itself, and end-of-sequence unless it is there already.

        Raises:
            DataError: the chat template cannot be used for any chat.
        """
        for document in documents:
            if (chat := document.open_chat) is not None:
                self._template_of(chat)
        drafts: list[Sequence[Drawn | RawText] | RowError | DataError] = []
        for document in documents:
            try:
                drafts.append(document.write(self))
            except (RowError, DataError) as error:
                drafts.append(error)
        flat = [draft for many in drafts if not isinstance(many, Exception) for draft in many]
        of_chats = iter(self._chats([draft for draft in flat if isinstance(draft, Drawn)]))
        of_raw_texts = iter(self._raw_texts([draft for draft in flat if isinstance(draft, RawText)]))
        return [
            many
            if isinstance(many, Exception)
            else [next(of_chats if isinstance(draft, Drawn) else of_raw_texts).after(self.prefix) for draft in many]
            for many in drafts
        ]

    def draw_chat(self, chat: Conversation) -> list[Drawn]:
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

    def raw_text(self, text: str, *, prompt: str | None = None) -> RawText:
        """Return raw text that begins with `prompt`, behind which it is trained; None: all of it is.

        Raises:
            RowError: it is no valid text, or special tokens are typed in it and are to be an error.
        """
        if prompt is not None:
            valid(prompt)
        return RawText(text=valid(text), prompt=prompt, notes=self._typed_raw(text))

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
        """Return the sample without its last answer: see `Sample.ask`.

        Raises:
            RowError: it asks nothing, or what it asks is empty or cannot be rendered.
            DataError: the chat template cannot be used.
        """
        text, ids = sample.ask(self)
        if not ids:
            raise RowError("the prompt is empty, and this tokenizer starts a text with no token of its own")
        return text, [*self.prefix, *ids]

    def ask_chat(self, chat: Conversation) -> tuple[str, list[int]]:
        """Return the chat without its last answer, as text and as tokens.

        Raises:
            RowError: it cannot be rendered.
            DataError: the chat template cannot be used.
        """
        template = self._template_of(chat)
        asked = kept_text(chat, self._control, self.typed)[0].open_chat
        text, _ = template.draw(asked.messages, asked.tools, True)
        if MARKED.search(valid(text)):
            return without_marks(text), self._apart(Drawn(text=text, spans=[])).ids_T.tolist()
        return text, self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def ask_raw(self, prompt: str) -> tuple[str, list[int]]:
        """Return a raw prompt as text and as tokens.

        Raises:
            RowError: it is no valid text.
        """
        ids = self.tokenizer.backend_tokenizer.encode(valid(prompt), add_special_tokens=True).ids
        return prompt, self._without_added_eos(self._one_start(ids, prompt), prompt)

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

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, special tokens too."""
        return self.tokenizer.decode(list(ids))

    def write(self, ids: list[int]) -> str:
        """Decode the tokens of an answer, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _only(rows: list[Rendered]) -> Rendered:
    assert len(rows) == 1, "its turns are rows of their own: ask render_rows"
    return rows[0]
