"""`alpaca`: instruction, optional input, output; rendered by the chat template as a chat."""

from typing import Any

from distft.data.chat import conversation
from distft.data.samples import Conversation, FormatSpec, Message, Row, RowError, kind_of, text_column


def convert(row: Row) -> Conversation:
    """Return one exchange, after an optional `system` and `history` (a list of [instruction, output] pairs).

    The input follows the instruction after a blank line.
    """
    messages = prompt_of(row)
    return conversation([*messages, {"role": "assistant", "content": text_column(row, "output")}])


def prompt_of(row: Row) -> list[Message]:
    """Return the messages before the answer.

    Raises:
        RowError: there is nothing asked, or the history is no list of pairs.
    """
    system = text_column(row, "system", default="")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answered in _history(row.get("history")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
    question = "\n\n".join(filter(None, (text_column(row, "instruction"), text_column(row, "input", default=""))))
    if not question:
        raise RowError('"instruction" and "input" are both empty')
    return [*messages, {"role": "user", "content": question}]


def _history(history: Any) -> list[list[Any]]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise RowError(f'"history" is {kind_of(history)}, expected a list of [instruction, output] pairs')
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f'"history" entry {number} is not an [instruction, output] pair')
    return history


SPEC = FormatSpec(
    name="alpaca",
    needs='"instruction", "output", optional "input", "system", "history"',
    matches=lambda row: "instruction" in row and "output" in row,
    convert=convert,
    reads=("instruction", "input", "output", "system", "history"),
    example={"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"},
)
