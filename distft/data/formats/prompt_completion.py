"""`prompt_completion`: two strings (raw text, no chat template) or two lists of messages (a chat)."""

from distft.data.chat import conversation
from distft.data.samples import Conversation, FormatSpec, PromptCompletion, Row, RowError, kind_of, text_column


def convert(row: Row) -> PromptCompletion | Conversation:
    """Strings give raw text; message lists one chat whose prompt messages are given, not learnt."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise RowError('"completion" is an empty list')
        return conversation(prompt + completion, row.get("tools"), num_prompt=len(prompt))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f'"prompt" is {kind_of(prompt)} but "completion" is {kind_of(completion)}; '
            "both must be strings, or both lists of messages"
        )
    return PromptCompletion(prompt=text_column(row, "prompt"), completion=text_column(row, "completion"))


SPEC = FormatSpec(
    name="prompt_completion",
    needs='"prompt" and "completion": two strings or two lists of messages',
    matches=lambda row: "prompt" in row and "completion" in row,
    convert=convert,
    example={"prompt": "2 + 2 =", "completion": " 4"},
)
