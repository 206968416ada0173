"""What a chat template leaves out of the messages it is given: found, refused, or noted where it is not trained."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from distft.core.errors import DataError
from distft.data.chat import REASONING as REASONING_KEYS
from distft.data.message_parts import CALL, REASONING, MessagePart, find, form_of, pieces, stand_in
from distft.data.samples import Conversation, Message, RowError
from distft.data.special_tokens import without_marks
from distft.data.template_probe import TemplateProbe

_WITH_TOOLS = ': chat_template = "chatml", "llama3" or "plain"'
_MOST_FORMS = 4096
"""Most forms of chats whose losses are remembered."""
CUT = "earlier turns, not trained in this row, lose their {} to the chat template"


@dataclass(frozen=True)
class TemplateContent(TemplateProbe, ABC):
    """A chat template, and what it leaves out."""

    _losses: dict[str, frozenset[tuple[int, str]]] = field(default_factory=dict, compare=False, repr=False)
    """What is left out of chats of one form."""
    _latest: dict[str, tuple[Conversation, frozenset[tuple[int, str]]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What the last chat loses."""

    @abstractmethod
    def _lost(self, chat: Conversation, index: int, kind: str, text: str) -> str:
        """Return the message about what the template leaves out, with a remedy that keeps it."""

    def _refuse_left_out(self, chat: Conversation) -> None:
        if chat.tools and not re.search(r"\btools\b", self.text):
            raise DataError(f'{self.label}: does not render "tools"  name a template that does{_WITH_TOOLS}')
        if "tool_calls" not in self.text and any("tool_calls" in message for message in chat.messages):
            raise DataError(
                f"{self.label}: does not render tool_calls, so those turns would be trained without  "
                f"name a template that does{_WITH_TOOLS}"
            )

    def _context(self, chat: Conversation, text: str, trained: set[int], *, rebuilt: bool = False) -> dict[str, str]:
        """Return what earlier turns lose, as notes. `rebuilt`: the text is not the template's own of the whole chat.

        Raises:
            RowError: something that a user, the system or a tool says is not in the text, or who says it.
        """
        notes: dict[str, str] = {}
        for tool in chat.tools or ():
            if tool["function"]["name"] not in text:
                raise RowError(
                    f"the chat template leaves out the tool {tool['function']['name']} of this row  name another "
                    "chat_template, or remove the tools from the row"
                )
        for index, message in enumerate(chat.messages):
            who = message.get("name") if message["role"] != "tool" else None
            if who is not None and who not in text:
                raise RowError(
                    f'message {index + 1}: the chat template does not render name ("{who}")  ignore = ["name"] in the '
                    "source's table leaves it out on purpose"
                )
            if index in trained:
                continue
            for lost in find(text, message).missing if rebuilt else self._missing(chat, text, index):
                if message["role"] != "assistant":
                    raise RowError(self._lost(chat, index, lost.kind, lost.text))
                notes.setdefault(CUT.format(lost.kind), f"message {index + 1}: {short(lost.text)}")
        return notes

    def _missing(self, chat: Conversation, text: str, index: int) -> list[MessagePart]:
        """Return the parts of the message at `index` that the text of the whole chat lacks.

        Short texts are found anywhere: the template is also asked about a chat of the same form that says other things.
        """
        message = chat.messages[index]
        missing = find(text, message).missing
        kinds = {kind for position, kind in self._loses(chat) if position == index}
        unseen = kinds - {piece.kind for piece in missing}
        lost = [piece for piece in pieces(message) if piece.kind in unseen]
        return lost + sorted(missing, key=lambda piece: piece.kind not in kinds)

    def _loses(self, chat: Conversation) -> frozenset[tuple[int, str]]:
        """Return what the template leaves out of a chat of this form: (index of the message, kind of piece)."""
        latest = self._latest.get("chat")
        if latest is not None and latest[0] is chat:
            return latest[1]
        form = f"{bool(chat.tools)} {form_of(chat.messages)}"
        if form not in self._losses:
            if len(self._losses) >= _MOST_FORMS:
                self._losses.clear()
            probe = stand_in(chat.messages)
            try:
                text, _ = self.draw(probe.messages, chat.tools, False)
            except RowError:
                self._losses[form] = frozenset()  # it looks at what is said, so the row itself must do
            else:
                self._losses[form] = frozenset(probe.lost(text))
        self._latest["chat"] = (chat, self._losses[form])
        return self._losses[form]

    def _left_out(self, chat: Conversation, index: int, kind: str, text: str) -> RowError | DataError:
        """Return a trained turn that loses something: the template's fault where it knows no reasoning at all."""
        message = chat.messages[index]
        if (
            kind == REASONING
            and "reasoning_content" in message
            and not any(name in self.text for name in REASONING_KEYS)
        ):
            return DataError(
                f"{self.label}: does not render reasoning_content, so those turns would be trained without  "
                f"name a template that has a place for it{self._inline()}"
            )
        who = f"message {index + 1} ({message['role']})"
        return RowError(f"{who}: the chat template leaves out its {kind}: {short(text)}  {self._keep(message, kind)}")

    def _keep(self, message: Message, kind: str) -> str:
        """Return what keeps what a template leaves out."""
        if kind == CALL and len(message["tool_calls"]) > 1:
            return "name a chat_template that writes several tool calls of one turn with their arguments"
        if message.get("tool_calls"):
            what = "its arguments" if kind == CALL else kind
            return f"name a chat_template that writes tool calls with {what}, or remove one of them"
        inline = self._inline() if kind == REASONING and "reasoning_content" in message else ""
        return f"name a chat_template that keeps it{inline}, or remove it from the row"

    def _inline(self) -> str:
        return "" if "</think>" in self.text else ", or write it into the content as <think>…</think>"


def short(text: str, limit: int = 60) -> str:
    """Return the beginning of a text on one line, between quotation marks, for messages."""
    text = " ".join(without_marks(text[: 2 * limit]).split())
    return f'"{text if len(text) <= limit else text[: limit - 1] + "…"}"'
