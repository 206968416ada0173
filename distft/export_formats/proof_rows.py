"""What an export and its source are both asked: prompts, texts to cut into tokens, chats to render."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from distft.core.errors import DataError
from distft.core.files import read_json_lines
from distft.export_formats.source import ModelSource

MAX_PROMPTS = 32
MIN_PROMPTS = 20
"""Where there are fewer rows, built-in prompts are added."""

VOCABULARY_TEXTS, TOKENS_OF_A_TEXT = 80, 8

Chat = tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class ProofRows:
    """Rows of the user, of the run's evaluation, or built-in ones."""

    origin: str
    """Where the prompts come from, in words."""
    prompts: tuple[str, ...]
    """Whole prompts as text, special tokens written out; read without adding any."""
    texts: tuple[str, ...]
    chats: tuple[Chat, ...]
    """Each ends with what the user says."""

    @property
    def sha256(self) -> str:
        """Of everything that is asked."""
        content = json.dumps([self.prompts, self.texts, self.chats], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()


def proof_rows(source: ModelSource, tokenizer: Any, file: Path | None, most: int | None) -> ProofRows:
    """Return the rows of `file`; without one those the run was evaluated on, and built-in ones.

    Raises:
        DataError: the file cannot be read, or a row of it is neither a prompt, a text nor a chat.
    """
    chats, prompts, origin = [], [], "built-in prompts"
    if file is not None:
        origin = f"rows of {file.name}"
        for row in _rows_of(file):
            chats += [row] if not isinstance(row, str) else []
            prompts.append(row if isinstance(row, str) else _render(tokenizer, row, file))
    elif source.run is not None and (found := list(_evaluated(source.run))):
        origin = "prompts of the run's evaluation"
        prompts = [prompt for prompt, _ in found]
        chats = [chat for _, chat in found if chat]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt][: most or MAX_PROMPTS]
    if len(prompts) < min(MIN_PROMPTS, most or MIN_PROMPTS):
        bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        own = [bos + text for text in PROMPTS]
        origin += "" if not prompts else " and built-in ones"
        prompts = list(dict.fromkeys([*prompts, *own]))[: most or MIN_PROMPTS]
    texts = tuple(dict.fromkeys([*BUILT_IN_TEXTS, *_of_vocabulary(tokenizer), *prompts]))
    allowed = tuple(_renderable(tokenizer, [*BUILT_IN_CHATS, *chats[:MAX_PROMPTS]])) if tokenizer.chat_template else ()
    return ProofRows(origin=origin, prompts=tuple(prompts), texts=texts, chats=allowed)


def _of_vocabulary(tokenizer: Any) -> Iterator[str]:
    """Yield texts of the tokenizer's own tokens, spread over its vocabulary, for merges that no other text needs."""
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    ids = [token for token in range(len(tokenizer)) if token not in special]
    stride = max(1, len(ids) // (VOCABULARY_TEXTS * TOKENS_OF_A_TEXT))
    chosen = ids[::stride]
    for start in range(VOCABULARY_TEXTS):
        text = tokenizer.decode(chosen[start::VOCABULARY_TEXTS][:TOKENS_OF_A_TEXT])
        text = unicodedata.normalize("NFC", text)
        if text and "\ufffd" not in text:
            yield text


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _rows_of(file: Path) -> Iterator[str | Chat]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--rows {file}: cannot be read: {error}") from None
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = True
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file} line {number}: is no JSON: {error}") from None
        yield _row(row, f"{file} line {number}")
    if not found:
        raise DataError(f"--rows {file}: has no rows")


def _row(row: Any, where: str) -> str | Chat:
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if asked:
            return tuple(asked)
    for key in ("prompt", "text"):
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, str) and value:
            return value
    raise DataError(
        f'{where}: allowed: {{"prompt": text}}, {{"text": text}} or {{"messages": [{{"role", "content"}}]}}'
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _render(tokenizer: Any, chat: Chat, file: Path) -> str:
    if not tokenizer.chat_template:
        raise DataError(f"{file}: holds chats, and the tokenizer has no chat template  fix: give prompts")
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))


def _renderable(tokenizer: Any, chats: Sequence[Chat]) -> Iterator[Chat]:
    """Yield the chats that the template takes: some refuse a system message."""
    for chat in chats:
        try:
            tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        except Exception:  # templates raise jinja's own errors and whatever their code meets
            continue
        yield chat


def _evaluated(run: Path) -> Iterator[tuple[str, Chat | None]]:
    """Yield prompt and chat of each row that the run's own sets asked."""
    from distft.run_record import read_run

    record = read_run(run)
    own = [entry.get("name") for entry in record.table("eval").get("answers") or [] if isinstance(entry, dict)]
    for name in own:
        label = next(
            (one for one in ("after", "best", "before") if (run / "eval" / one / f"{name}.jsonl").is_file()), ""
        )
        for answer in read_json_lines(run / "eval" / label / f"{name}.jsonl") if label else ():
            messages = (answer.get("row") or {}).get("messages")
            chat = _row({"messages": messages}, "row") if _plain_chat(messages) else None
            yield str(answer.get("prompt", "")), chat if isinstance(chat, tuple) else None


def _plain_chat(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) > 1 and all(_is_message(message) for message in messages)


PROMPTS = (
    "Once upon a time", "The little dog", "One day, a girl named Lily", "In the morning,", "The capital of France is",
    "Water boils at", "def add(a, b):\n    return", "Dear Sir or Madam,", "1, 2, 3, 4,", "The quick brown fox",
    "Q: What is 2 + 2?\nA:", "She opened the door and", "Yesterday it rained, so", "My favourite food is",
    "The results of the experiment", "He said: \"", "A list of animals:\n- cat\n-", "Please help me", "The sun is",
    "They lived happily", "Tom and his mom went to", "To sum up,", "The server reports an error:", "There was a big",
)  # fmt: skip
"""Asked where there are no rows."""

_PIECES = (
    "Hello world", "The year 2024 had 366 days", "naïve café über straße", "汉字和假名 カタカナ ひらがな",
    "Привет, мир", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "한국어 문장입니다", "emoji 😀👍🏽🇪🇺 end",
    "don't can't I'll we've", "for (int i = 0; i < 10; i++) {", "x = [1, 2.5e-3, -7]",
    "https://example.org/a?b=c&d=%20", "tabs\tand\ttabs", "UPPER lower MiXeD", "3.14159 1,000,000",
    '{"key": "value"}', "a_b-c/d\\e", "№ § © ® ™ … – —",
)  # fmt: skip
_SURROUNDINGS = ("{}", " {}", "{} ", "  {}\n", "\n\n{}", "{0}\n{0}", "\t{}", "{0}   {0}", "({})", "{}!!!", "\r\n{}")
BUILT_IN_TEXTS = tuple(around.format(piece) for piece, around in product(_PIECES, _SURROUNDINGS))
"""Texts of many scripts, in normal form C, with spaces and line ends in every place."""

BUILT_IN_CHATS: tuple[Chat, ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"}),
    (
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ),
    (
        {"role": "system", "content": "Du bist höflich."},
        {"role": "user", "content": "Straße? 😀"},
        {"role": "assistant", "content": "Straße."},
        {"role": "user", "content": "Danke\nund tschüss"},
    ),
    ({"role": "user", "content": 'for x in {{1, 2}}:\n    print("x = %d" % x)'},),
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f"},
    ),
)
"""Without spaces around contents: some templates trim them, and Go templates cannot."""
