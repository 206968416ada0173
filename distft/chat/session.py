"""A conversation in the terminal: what is typed, what is answered by whom, and the commands that start with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.nearest import nearest
from distft.generation.completion import SamplingParams

if TYPE_CHECKING:
    from distft.chat.models import ChatModels, Reply

HELP = """\
/adapter NAME   let this model answer from now on (tuned, base, or the name of an --adapter)
/base           answer with the base model as well, beside the chosen one; again: no more
/system TEXT    begin anew with this system text
/new            begin anew
/save FILE      write the conversation as a line of JSON, in the form that [[data.train]] reads as messages
/help           this
/quit           end (so does the end of input)"""


class Session:
    """One conversation. The chosen model's answers are kept; the base's are for comparison alone."""

    def __init__(
        self,
        models: ChatModels,
        how: SamplingParams,
        *,
        name: str,
        compare: bool,
        write: Callable[[str], None],
        system: str = "",
    ) -> None:
        self._models, self._how, self._write = models, how, write
        self._name, self._compare = name, compare
        self._system = system
        self.messages: list[dict[str, str]] = self._opening()

    def take(self, line: str) -> bool:
        """Do what was typed; False: it was the wish to end."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self.ask(text)
            return True
        word, _, rest = text.partition(" ")
        commands = {"/adapter": self._choose, "/base": self._toggle, "/system": self._begin, "/new": self._renew}
        commands |= {"/save": self._save, "/help": lambda _: self._say(HELP)}
        if word == "/quit":
            return False
        if word in commands:
            commands[word](rest.strip())
        else:
            meant = nearest(word, [*commands, "/quit"])
            self._say(f"{word}: no such command" + (f"  did you mean {meant}?" if meant else "") + "  /help lists them")
        return True

    def ask(self, text: str) -> list[Reply]:
        """Ask the chosen model, and the base beside it where that is on; return their answers."""
        self.messages.append({"role": "user", "content": text})
        names = [self._name] + (["base"] if self._compare and self._name != "base" else [])
        replies = []
        for name in names:
            if len(self._models.names) > 1:
                self._write(f"{name}: ")
            replies.append(self._models.reply(name, self.messages, self._how, self._write))
            if replies[-1].chosen:
                self._write(f"  [{replies[-1].chosen}]")
            self._write("\n" if replies[-1].ended else f" … (cut at {replies[-1].num_tokens} tokens)\n")
        self.messages.append({"role": "assistant", "content": replies[0].text})
        return replies

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _choose(self, name: str) -> None:
        if name not in self._models.names:
            meant = nearest(name, self._models.names)
            hint = f"  did you mean {meant}?" if meant else ""
            self._say(f"/adapter {name}: no such model{hint}  allowed: {', '.join(self._models.names)}")
            return
        self._name = name
        self._say(f"{name} answers")

    def _toggle(self, rest: str) -> None:
        if "base" not in self._models.names:
            self._say("/base: the base is not loaded  start with --base")
            return
        self._compare = not self._compare
        self._say("the base answers as well" if self._compare else "the base is quiet")

    def _begin(self, text: str) -> None:
        self._system = text
        self._renew("")

    def _renew(self, rest: str) -> None:
        self.messages = self._opening()
        self._say("a new conversation")

    def _save(self, name: str) -> None:
        if not name:
            self._say("/save FILE: the file's name is missing")
            return
        file = Path(name).expanduser()
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"/save {name}: {error.strerror}")
            return
        self._say(f"saved {len(self.messages)} messages to {file}")


def as_json(prompt: str, replies: Sequence[Reply]) -> str:
    """Return one question and its answers as a JSON object."""
    return json.dumps({"prompt": prompt, "answers": [vars(reply) for reply in replies]}, ensure_ascii=False, indent=1)
