"""Requests for answers as OpenAI's API has them; what this server cannot do is refused by the field that asks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, model_validator

from distft.service.errors import ApiError
from distft.service.wire import WireObject, WireRequest

Stop = str | Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=256)]], Field(max_length=4)]
OFF: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None,),
    "metadata": (None, {}),
}
"""Fields that this server does not serve -> values by which they ask for nothing."""
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
"""Fields that name who asks or how to keep prompts, and change no answer."""


class TextPart(WireRequest):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(WireRequest):
    """What a call of a tool calls."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    arguments: str


class ToolCall(WireRequest):
    """A call in an earlier turn of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDefinition(WireRequest):
    """A function that the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolRequest(WireRequest):
    """A tool; those of other types are not understood."""

    type: Literal["function"]
    function: FunctionDefinition


class MessageRequest(WireRequest):
    """A message; pictures and sound are not understood."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> MessageRequest:
        if self.content is None and self.tool_calls is None:
            raise ValueError("content is missing")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls are of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with role = tool")
        return self

    @property
    def text(self) -> str:
        """Its text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def speaks_of_tools(self) -> bool:
        """Whether a template that knows no tools could not render it."""
        return self.tool_calls is not None or self.role == "tool"

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates have it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls is not None:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class TextFormat(WireRequest):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(WireRequest):
    """An object of JSON."""

    type: Literal["json_object"]


class JsonSchema(WireRequest):
    """A schema with its name."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, JsonValue] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Answers keep to the schema either way."""


class JsonSchemaFormat(WireRequest):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(WireRequest):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AnswerRequest(WireRequest):
    """What both kinds of request have."""

    model: str
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, JsonValue] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options(self) -> AnswerRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream = true")
        return self

    def refuse_unserved(self) -> None:
        """Refuse the first field that asks for what this server cannot do.

        Raises:
            ApiError: status 400, with the field's name.
        """
        for name, off in OFF.items():
            value = getattr(self, name, None)
            if not any(value is word if word is None or isinstance(word, bool) else value == word for word in off):
                raise ApiError(
                    400, f"'{name}' is not supported by this server.", param=name, code="unsupported_parameter"
                )

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        return [text for text in texts if text]


class ChatRequest(AnswerRequest):
    """POST /chat/completions."""

    messages: Annotated[list[MessageRequest], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolRequest], Field(max_length=128)] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    functions: list[JsonValue] | None = None
    function_call: JsonValue = None
    response_format: ResponseFormat | None = None
    audio: JsonValue = None
    modalities: list[str] | None = None
    prediction: JsonValue = None
    moderation: JsonValue = None
    web_search_options: JsonValue = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _top_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens say two things")
        return self

    def answer_schema(self) -> dict[str, JsonValue] | None:
        """Return the JSON schema that answers keep to; None: any text.

        Raises:
            ApiError: status 400: no message speaks of JSON, or tools are offered as well.
        """
        if self.response_format is None or isinstance(self.response_format, TextFormat):
            return None
        if self.offered_tools():
            message = "'response_format' is not supported by this server beside tools: a call is no such JSON."
            raise ApiError(400, message, param="response_format", code="unsupported_parameter")
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.json_schema or {}
        if not any("json" in message.text.lower() for message in self.messages):
            message = "'messages' must contain the word 'json' in some form, to use 'response_format' of type"
            raise ApiError(400, f"{message} 'json_object'.", param="messages", code="invalid_value")
        return {"type": "object"}

    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the model may call.

        Raises:
            ApiError: status 400: what cannot be promised is asked for.
        """
        if not self.tools or self.tool_choice == "none":
            return []
        if self.parallel_tool_calls is False:
            message = "'parallel_tool_calls' is not supported by this server but as true: nothing holds a model back."
            raise ApiError(400, message, param="parallel_tool_calls", code="unsupported_parameter")
        for number, tool in enumerate(self.tools):
            if tool.function.strict:
                message = "'strict' is not supported by this server: nothing makes a model keep to a schema."
                raise ApiError(400, message, param=f"tools.{number}.function.strict", code="unsupported_parameter")
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionRequest(AnswerRequest):
    """POST /completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    def prompts(self) -> list[dict[str, Any]]:
        """Return each prompt as text or as tokens.

        Raises:
            ApiError: there is none, or there are too many.
        """
        match self.prompt:
            case str() as text:
                return [{"prompt": text}]
            case [int(), *_] as ids:
                return [{"ids": ids}]
            case list() as several:
                if 1 <= len(several) <= 16:
                    return [{"prompt": asked} if isinstance(asked, str) else {"ids": asked} for asked in several]
        raise ApiError(400, "'prompt' holds 1 to 16 prompts.", param="prompt", code="invalid_value")


class Usage(WireObject):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(WireObject):
    """A token of an answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[dict[str, Any]]


class ChatMessage(WireObject):
    """The message that answers."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(WireObject):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(WireObject):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class TextChoice(WireObject):
    """One of the texts."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"]


class TextAnswer(WireObject):
    """A completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str | None = None
