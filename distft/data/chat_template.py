"""Which characters of a rendered chat are trained: by the template's generation marks, else by verified prefixes.

A chat is one row where the template writes every trained turn as it writes a last one. Where it rewrites earlier turns
(cuts their reasoning, ends them otherwise), each trained turn becomes a row of its own, rendered as the last one: what
the model sees when it is to write that turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from distft.core.errors import DataError
from distft.data.drafts import Drawn, Span
from distft.data.message_parts import CALL, REASONING, find, pieces, says_nothing, stand_in, thought_and_answer
from distft.data.samples import Conversation, Message, RowError
from distft.data.template_content import TemplateContent, short
from distft.data.template_probe import NEXT

LossOn: TypeAlias = Literal["assistant", "completion", "last_turn", "all"]
_OPENER = re.compile(r"(?:<(?P<tag>[\w:]*think\w*)>|\[(?P<square>THINK)\]|<\|START_(?P<cohere>THINKING)\|>)\s*$", re.I)
"""How a generation prompt opens a block of reasoning."""
_NO_THOUGHT = re.compile(
    r"(?:<(?P<tag>[\w:]*think\w*)>\s*</(?P=tag)>|\[THINK\]\s*\[/THINK\]|"
    r"<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel>thought\s*<channel\|>)\s*$",
    re.I,
)
"""How a generation prompt says that there is no reasoning."""
SPLIT = "chats whose trained turns became rows of their own: the chat template rewrites earlier turns"
OPENED = "trained turns that close the block of reasoning which the generation prompt opens, and which the row left out"
UNTRAINED = "turns left untrained: weight 0 or train = false"
EMPTY_TURN = "turns left untrained: the answer is empty"


def wanted_turns(chat: Conversation, loss_on: LossOn) -> set[int]:
    """Return the indices of the assistant messages to train, before what the row says of single ones.

    `assistant`: every one; `last_turn`: the last message; `completion`: those after the last user message, so a tool
    call and the answer that follows its result; `all`: every one. In a row that separates prompt from completion only
    the completion's messages count, whatever the setting.
    """
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    first = 0 if loss_on == "all" else chat.num_prompt
    if loss_on == "last_turn":
        first = turns[-1]
    elif loss_on == "completion" and not chat.num_prompt:
        first = max((index for index, message in enumerate(chat.messages) if message["role"] == "user"), default=0)
    return {index for index in turns if index >= first}


@dataclass(frozen=True)
class ChatTemplate(TemplateContent):
    """A chat template bound to a tokenizer's special tokens: which turns it shows, and where."""

    def trained(self, chat: Conversation, loss_on: LossOn) -> list[Drawn]:
        """Render the chat as the texts of one row or more, with the characters to train: each wanted turn from its
        header to its end token.

        Raises:
            RowError: the template refuses the chat, or leaves out something that it says.
            DataError: the template leaves out tools, or does not let the wanted turns be found.
        """  # noqa: D205
        self._refuse_left_out(chat)
        wanted, notes = self._choose(chat, loss_on)
        text, marks = self.draw(chat.messages, chat.tools, False)
        if loss_on == "all":
            return [self._whole(chat, text, marks, wanted, notes)]
        if not wanted:
            return [Drawn(text=text, spans=[], notes=notes, empty=EMPTY_TURN in notes)]
        spans = [self._in_place(chat, text, marks, index) for index in sorted(wanted)]
        turn_spans = [span for span in spans if span is not None]
        if len(turn_spans) == len(spans):
            last = len(chat.messages) - 1
            text, turn_spans = self._with_header(chat, text, turn_spans) if last in wanted else (text, turn_spans)
            return [Drawn(text=text, spans=turn_spans, notes=notes | self._context(chat, text, wanted))]
        rows = [self._as_last(chat, index) for index in sorted(wanted)]
        if len(rows) > 1:
            notes[SPLIT] = f"{len(rows)} rows"
        return [replace(rows[0], notes=notes | rows[0].notes), *rows[1:]]

    def _choose(self, chat: Conversation, loss_on: LossOn) -> tuple[set[int], dict[str, str]]:
        """Return the turns to train, without those that the row leaves out or that are empty, and notes on these."""
        for number, message in enumerate(chat.messages, 1):
            trained = message.get("trained")
            if message["role"] != "assistant" and trained is not None and trained == (loss_on != "all"):
                raise RowError(
                    f"message {number} ({message['role']}) is to be {'trained' if trained else 'left untrained'}, "
                    f'which loss_on = "{loss_on}" does not do: '
                    + ("it trains assistant turns only" if trained else "it can leave out assistant turns only")
                    + "  remove that key from the message"
                )
        wanted = wanted_turns(chat, loss_on)
        left = {index for index in wanted if chat.messages[index].get("trained") is False}
        empty = {index for index in wanted - left if says_nothing(chat.messages[index])}
        notes = {kind: f"message {min(which) + 1}" for kind, which in ((UNTRAINED, left), (EMPTY_TURN, empty)) if which}
        return wanted - left - empty, notes

    def _whole(
        self, chat: Conversation, text: str, marks: list[Span], wanted: set[int], notes: dict[str, str]
    ) -> Drawn:
        """Train every token of the chat but those of turns that are left out."""
        last, whole = len(chat.messages) - 1, text
        if last in wanted and self._missing(chat, text, last):
            text = self._as_last(chat, last).text
        elif last in wanted:
            text, _ = self._with_header(chat, text, [(0, len(text))])
            whole = text
        rebuilt = text != whole
        for index, message in enumerate(chat.messages):
            lost = find(text, message).missing if rebuilt and index == last else self._missing(chat, text, index)
            if lost:
                raise RowError(self._lost(chat, index, lost[0].kind, lost[0].text))
        self._context(chat, text, wanted)
        if not wanted:
            return Drawn(text=text, spans=[], notes=notes, empty=EMPTY_TURN in notes)
        spans, begin = [], 0
        for index in sorted(wanted_turns(chat, "all") - wanted):
            excluded = self._in_place(chat, text, marks, index)
            if excluded is None:
                raise RowError(
                    f"message {index + 1} is to be left untrained, and the chat template does not show where it ends  "
                    'use loss_on = "assistant"'
                )
            spans.append((begin, excluded[0]))
            begin = excluded[1]
        return Drawn(text=text, spans=[span for span in (*spans, (begin, len(text))) if span[0] < span[1]], notes=notes)

    def _lost(self, chat: Conversation, index: int, kind: str, text: str) -> str:
        """Return the message that the template leaves out something, with a remedy that keeps it."""
        message = chat.messages[index]
        problem = f"message {index + 1} ({message['role']}): the chat template leaves out its {kind}: {short(text)}"
        if message["role"] != "assistant":
            return f"{problem}  move it into a message that the template renders, or name another chat_template"
        if kind != CALL and not message.get("tool_calls"):
            try:
                self._as_last(Conversation(messages=chat.messages[: index + 1], tools=chat.tools), index)
            except (RowError, DataError):
                pass
            else:
                return f'{problem}  loss_on = "assistant" trains each turn as a row of its own, with all that it says'
        return f"{problem}  {self._keep(message, kind)}"

    def _in_place(self, chat: Conversation, text: str, marks: list[Span], index: int) -> Span | None:
        """Return where the whole chat's text has the turn at `index` just as if it were the last; None: it does not."""
        if self.marked:
            span = self._marked_turns(chat, text, marks, index)
            lost = find(text, chat.messages[index], *span).missing or self._missing(chat, text, index)
            return None if lost else span
        if self._missing(chat, text, index):
            return None
        before, _ = self.draw(chat.messages[:index], chat.tools, True)
        through, _ = self.draw(chat.messages[: index + 1], chat.tools, False)
        common = _common(through, text)
        if not text.startswith(before) or common < len(before):
            return None
        return self._ending(chat, index, text, len(before), common, rewritten=common < len(through))

    def _ending(
        self, chat: Conversation, index: int, text: str, begin: int, limit: int, *, rewritten: bool = False
    ) -> Span | None:
        """Return the span from `begin` to the end token of the turn at `index`.

        None: a part of its content is not in `text[begin:limit]`, or no token ends it.
        """
        match = find(text, chat.messages[index], begin, limit)
        if match.missing:
            return None
        if self._stops_at_header:  # tokens inside the turn, as around a call, end nothing
            next_token = self.any_token.search(text, limit)
            if next_token is not None and not text[limit : next_token.start()].strip():
                return begin, next_token.end()
            return (begin, limit) if limit == len(text) else None
        ends = [token.end() for token in self.any_token.finditer(text, match.end, limit)]
        end = self._last_own_end(chat, index, text[:limit], ends, rewritten) if ends else None
        return None if end is None else (begin, end)

    def _last_own_end(
        self, chat: Conversation, index: int, through: str, ends: list[int], rewritten: bool
    ) -> int | None:
        """Return the end of the last of a turn's tokens that another message would not take away.

        A template may end the text of a whole chat with a token more, or with the header of an answer (the first
        Llama 3's), which begins as others do. `rewritten`: something behind the turn was taken away already. None: only
        a header is left to end the turn.
        """
        if len(ends) == 1 or (index + 1 < len(chat.messages) and not rewritten):
            return ends[-1]
        if index + 1 < len(chat.messages):
            return self._last_stop(through, ends)
        following: Message = {"role": "tool", "content": "done"} if chat.messages[index].get("tool_calls") else NEXT
        try:
            followed, _ = self.draw([*chat.messages[: index + 1], following], chat.tools, False)
        except RowError:
            return ends[-1]
        common = _common(followed, through)
        own_ends = [end for end in ends if end <= common]
        if len(own_ends) in (0, len(ends)):  # none: the turn itself is written otherwise once another follows
            return ends[-1]
        return own_ends[0] if len(own_ends) == 1 else self._last_stop(through, own_ends)

    def _last_stop(self, through: str, ends: list[int]) -> int | None:
        return next((end for end in reversed(ends) if through.endswith(self.stop, 0, end)), None)

    def _as_last(self, chat: Conversation, index: int) -> Drawn:
        """Return the chat up to the turn at `index`, that turn trained.

        Raises:
            RowError: the template leaves out something that the turn says.
            DataError: where the turn begins or ends cannot be told.
        """
        messages, upto = chat.messages, Conversation(messages=chat.messages[: index + 1], tools=chat.tools)
        text, marks = self.draw(upto.messages, chat.tools, False)
        if self.marked:
            spans = [self._marked_turns(upto, text, marks, index)]
            if lost := self._missing(upto, text, index) or find(text, messages[index], *spans[0]).missing:
                raise self._left_out(chat, index, lost[0].kind, lost[0].text)
            return Drawn(text=text, spans=spans, notes=self._context(upto, text, {index}))
        before, _ = self.draw(messages[:index], chat.tools, True)
        opener, written = _OPENER.search(before), text
        rebuilt = not text.startswith(before)
        if rebuilt:
            if opener is None or not text.startswith(before[: opener.start()]):
                text = self._behind(before, text, messages, chat.tools, index)
            else:
                return self._closed(upto, index, before, opener)
        lost = self._missing(upto, text, index) or find(text, messages[index], len(before)).missing
        if lost and opener is not None and lost[0].kind == REASONING:
            return self._closed(upto, index, before, opener)
        if lost:
            raise self._left_out(chat, index, lost[0].kind, lost[0].text)
        moved = len(text) - len(written)  # where it ends is told by the template's own text
        span = self._ending(upto, index, written, len(before) - moved, len(written))
        if span is None:
            raise DataError(f"{self.label}: ends message {index + 1} without a token that would stop the model")
        span = (len(before), span[1] + moved)
        notes = self._context(upto, text, {index}, rebuilt=rebuilt)
        text, spans = self._with_header(upto, text, [span])
        return Drawn(text=text, spans=spans, notes=notes)

    def _behind(self, before: str, text: str, messages: Sequence[Message], tools: Any, index: int) -> str:
        """Return the turn at `index` behind its generation prompt, where the template changes what comes before it.

        Mistral's writes the system message and the tools into the last of the users' messages only while it is the
        last of all.

        Raises:
            DataError: where the turn begins in `text` cannot be told by what the two have in common before it.
        """
        previous = pieces(messages[index - 1])[-1:] if index else []
        probe = stand_in(messages[:index])  # short texts may stand in the header too: numbers do not
        number = next((name for name in reversed(probe.pieces) if probe.pieces[name][0] == index - 1), "")
        drawn_prompt, _ = self.draw(probe.messages, tools, True)
        header = (
            previous[0].text + drawn_prompt[drawn_prompt.rfind(number) + len(number) :]
            if previous and number in drawn_prompt
            else ""
        )
        turn = self._turn_after(header, text, messages[index]) if before.endswith(header) else None
        if turn is None:
            closed, _ = self.draw(messages[:index], tools, False)
            prompt = before[len(closed) :] if before.startswith(closed) else ""
            turn = self._turn_after(prompt, text, messages[index])
            if turn is None and (block := _NO_THOUGHT.search(prompt)):
                turn = self._without_thought(prompt[: block.start()], text, messages, index)
        if turn is None:
            raise DataError(self._differs(index))
        return before + turn

    def _turn_after(self, header: str, text: str, message: Message) -> str | None:
        """Return what follows the last `header` with the whole message behind it; a header holds an added token."""
        if not self.any_token.search(header):
            return None
        start = text.rfind(header)
        while start >= 0 and find(text, message, start + len(header)).missing:
            start = text.rfind(header, 0, start)
        return None if start < 0 else text[start + len(header) :]

    def _without_thought(self, header: str, text: str, messages: Sequence[Message], index: int) -> str | None:
        """Return a turn behind a generation prompt that holds an empty block of reasoning, which the turn itself lacks.

        Raises:
            RowError: the turn has reasoning, for which that prompt leaves no place.
        """
        if thought := thought_and_answer(messages[index])[0]:
            raise RowError(
                f"message {index + 1} (assistant): its reasoning cannot be trained, as the chat template's generation "
                f"prompt says that there is none: {short(thought)}  name a chat_template that opens a block of "
                "reasoning, or remove it from the row"
            )
        turn = self._turn_after(header, text, messages[index])
        return None if turn is None or turn.lstrip()[:2] == "</" else turn

    def _closed(self, upto: Conversation, index: int, before: str, opener: re.Match[str]) -> Drawn:
        """Return a turn after a generation prompt that opens a block of reasoning.

        It goes on with the reasoning and closes the block, also where there is none, or the model would be trained on
        another prompt than it is asked with.
        """
        message = upto.messages[index]
        thought, answer = thought_and_answer(message)
        bare = {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": answer}
        history = upto.messages[:index]
        plain, _ = self.draw([*history, bare], upto.tools, False)
        header = before[: opener.start()]
        if not plain.startswith(header):
            raise DataError(self._differs(index))
        closer = _closer(opener)
        thinks = thought + "\n" if thought else "\n"
        text = before + ("" if before.endswith("\n") else "\n") + thinks + f"{closer}\n\n" + plain[len(header) :]
        alone = Conversation(messages=[*history, message], tools=upto.tools)
        match = find(text, message, len(before))
        if match.missing:
            raise self._left_out(upto, index, match.missing[0].kind, match.missing[0].text)
        closes = text.find(closer, len(before)) + len(closer)
        ends = [token.end() for token in self.any_token.finditer(text, max(match.end, closes))]
        if not ends:
            raise DataError(f"{self.label}: ends message {index + 1} without a token that would stop the model")
        notes = {} if thought else {OPENED: f"message {index + 1}"}
        return Drawn(text=text, spans=[(len(before), ends[-1])], notes=notes | self._context(alone, text, {index}))

    def _differs(self, index: int) -> str:
        return (
            f"{self.label}: has no {{% generation %}} marks, and renders messages up to {index + 1} differently "
            "when others follow, so the assistant's tokens cannot be told apart  "
            "put {% generation %} marks into a copy and name that file, or use a built-in template"
        )

    def _marked_turns(self, chat: Conversation, text: str, marks: list[Span], index: int) -> Span:
        spans: list[Span] = []
        for begin, end in marks:  # a turn may be marked in several adjoining parts
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            elif end > begin:
                spans.append((begin, end))
        turns = [position for position, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise DataError(f"{self.label}: marks {len(spans)} of {len(turns)} assistant turns with {{% generation %}}")
        begin, end = spans[turns.index(index)]
        if not text[begin:end].rstrip().endswith(self.tokens):
            shown = text[max(begin, end - 40) : end]
            raise DataError(f"{self.label}: marks a turn without the token that ends it: …{shown!r}")
        return begin, end


def _common(first: str, second: str) -> int:
    """Return how many characters two texts have in common from their start, found by halving."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _closer(opener: re.Match[str]) -> str:
    if opener["tag"]:
        return f"</{opener['tag']}>"
    return "[/THINK]" if opener["square"] else "<|END_THINKING|>"
