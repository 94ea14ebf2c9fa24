"""The bodies of requests, checked: kinds, ranges, and what is refused by name. Knows JSON, not text and not models.

A field that is null counts as left out. Fields that nobody knows are let through and reported as `ignored_fields`; a
field that is known but not supported is refused, unless its value asks for nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from server.errors import invalid_parameter, unsupported_parameter

_INT64 = 2**63
_MAX_STOPS = 4
MAX_CHOICES = 128
ANY_OBJECT: dict[str, Any] = {"type": "object"}

# name -> the values that ask for nothing; every other value is refused
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_TOKENIZE_REFUSALS: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
    "return_token_strs": (False,),
    "tools": ([],),
}
_CHAT_ONLY_REFUSALS: dict[str, tuple[Any, ...]] = {"echo": (False,), "best_of": (1,), "prompt": ()}

TokenId = Annotated[int, Field(ge=0)]
_ROLES = ("system", "developer", "user", "assistant")
# for /openapi.json, where the kinds below cannot say it
_BIASES: dict[str, Any] = {
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_FORMS: list[Any] = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}, "minItems": 1},
    _IDS,
    {"type": "array", "items": _IDS, "minItems": 1},
]


class Body(BaseModel):
    """What all bodies share. Kinds are strict: "1" is no number, and true is none either."""

    model_config = ConfigDict(extra="allow", strict=True)
    _refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # name -> the values that ask for nothing

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse(data, cls._refused)
        return data

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def ignored_fields(self) -> list[str]:
        """Names that nobody knows, sorted."""
        return sorted(self.model_extra or {})


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool = False


class JsonSchema(BaseModel):
    """`json_schema` of a response format. Only the schema counts; it is always held, strict or not."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: dict(ANY_OBJECT), alias="schema")


class ResponseFormat(BaseModel):
    """What the answer's text has to be."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given together with the type json_schema, and only then")
        return self

    def schema_text(self) -> str | None:
        """The schema as JSON text; None where any text will do."""
        if self.type == "text":
            return None
        return json.dumps(ANY_OBJECT if self.json_schema is None else self.json_schema.schema_)


class GenerationBody(Body):
    """What completions and chat share: how tokens are chosen, when to stop, how the answer is sent."""

    _refused = _NOT_SUPPORTED

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # 0 and -1: off
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] = Field(default_factory=list, json_schema_extra={"minLength": 1, "maxItems": _MAX_STOPS})
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, float] = Field(default_factory=dict, json_schema_extra=_BIASES)
    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def _stop_list(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > _MAX_STOPS or "" in stops:
            raise ValueError(f"must be a string or up to {_MAX_STOPS} strings, none of them empty")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
            raise ValueError("keys must be token ids")
        if not all(-100 <= bias <= 100 for bias in value.values()):
            raise ValueError("values must be between -100 and 100")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise invalid_parameter("stream_options may only be given together with stream=true.", "stream_options")
        return self

    @model_validator(mode="after")
    def _json_has_an_end(self) -> GenerationBody:
        if self.ignore_eos and self.json_schema is not None:
            raise invalid_parameter("ignore_eos may not be given together with a JSON response_format.", "ignore_eos")
        return self

    @property
    def json_schema(self) -> str | None:
        """JSON text of the schema that the answer has to fit."""
        return None if self.response_format is None else self.response_format.schema_text()

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def ignored_fields(self) -> list[str]:
        own = [name for name in super().ignored_fields() if name not in _NOT_SUPPORTED]
        return sorted([*own, *_extra("stream_options", self.stream_options), *self._format_extra()])

    def _format_extra(self) -> list[str]:
        inner = None if self.response_format is None else self.response_format.json_schema
        return [*_extra("response_format", self.response_format), *_extra("response_format.json_schema", inner)]


def _extra(prefix: str, part: BaseModel | None) -> list[str]:
    """Names within a part of the body that nobody knows."""
    return [] if part is None else [f"{prefix}.{name}" for name in part.model_extra or {}]


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompts` is the prompt in its one general form: texts or lists of token ids."""

    prompt: Any = Field(json_schema_extra={"anyOf": _PROMPT_FORMS})
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None
    add_special_tokens: bool = True

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        return prompt_list(value)

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported_parameter("best_of")
        return self


def prompt_list(value: Any) -> list[str | list[int]]:
    """string | [string] | [int] | [[int]] as a list of prompts. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


class Message(BaseModel):
    """One message of a chat. `content` is text; a list of text parts becomes lines of one text."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(json_schema_extra={"enum": [*_ROLES]})
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        plain = {k: v for k, v in data.items() if v is not None}
        refuse(plain, {"tool_calls": ([],), "function_call": (), "audio": ()}, "messages.")
        plain["content"] = _text(plain.get("content", "" if plain.get("role") == "assistant" else None))
        return plain

    @field_validator("role")
    @classmethod
    def _known_role(cls, value: str) -> str:
        """`developer` is what newer models call `system`; templates know the latter."""
        if value not in _ROLES:
            raise ValueError(f"{value!r} is not supported; one of {', '.join(_ROLES)} is")
        return "system" if value == "developer" else value

    def for_template(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


def _text(content: Any) -> Any:
    """Content as text, where it is; anything else is left for the check of kinds."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise unsupported_parameter(f"messages.content of type {kind!r}")
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    _refused = {**_CHAT_ONLY_REFUSALS, **_NOT_SUPPORTED}

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_parameter("top_logprobs may only be given together with logprobs=true.", "top_logprobs")
        return self

    def ignored_fields(self) -> list[str]:
        extra = {f"messages.{name}" for message in self.messages for name in message.model_extra or {}}
        own = [name for name in super().ignored_fields() if name not in _CHAT_ONLY_REFUSALS]
        return sorted([*own, *(extra - {"messages.tool_calls"})])


class TokenizeBody(Body):
    """POST /tokenize: a text, or a chat as its template renders it."""

    _refused = _TOKENIZE_REFUSALS

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid_parameter("Either prompt or messages must be given, and not both.", "prompt")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]
    skip_special_tokens: bool = False


def refuse(data: dict[str, Any], names: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raises ApiError for the first field of `names` whose value asks for something."""
    for name, neutral in names.items():
        value = data.get(name)
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise unsupported_parameter(prefix + name)
