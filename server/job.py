"""From a checked body to a job: token ids, requests for the engine, and the answer that they will fill.

Knows the loaded model's tokenizer and context; not connections. Tokenising takes time: call it in a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.request import Request, SamplingParams
from runtime.schema_grammar import SchemaError, check_schema
from server.answers import Answer, ChatAnswer, CompletionAnswer
from server.chat import render_chat
from server.errors import invalid_parameter
from server.schemas import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody, TokenizeBody
from server.stream import Choice, Prompt

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer
    from server.async_engine import LoadedModel

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Job:
    """Requests and choices by index, prompt-major."""

    requests: list[Request]
    choices: list[Choice]
    answer: Answer


def completion_job(body: CompletionBody, model: LoadedModel, name: str) -> Job:
    """Of POST /v1/completions. Raises ApiError."""
    _check_format(body)
    if len(body.prompt) * body.n > MAX_CHOICES:
        raise invalid_parameter(f"The prompts times n must not be more than {MAX_CHOICES}.", "prompt")
    _check_room(len(body.prompt) * body.n, model, "prompt" if len(body.prompt) > 1 else "n")
    prompts = [_prompt(model.tokenizer, prompt, body.add_special_tokens) for prompt in body.prompt]
    choices = [
        Choice(i * body.n + j, prompt, model.tokenizer, body.stops, body.echo, continuing=True)
        for i, prompt in enumerate(prompts)
        for j in range(body.n)
    ]
    answer = CompletionAnswer(
        model=name,
        choices=choices,
        num_prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        tokenizer=model.tokenizer,
        num_top=body.logprobs,
        include_usage=body.include_usage,
        ignored_fields=body.ignored_fields(),
    )
    prompt_logprobs = body.logprobs if body.echo else None
    requests = [
        _request(answer, choice, body, _completion_tokens(body, choice, model), body.logprobs, prompt_logprobs)
        for choice in choices
    ]
    return Job(requests, choices, answer)


def chat_job(body: ChatBody, model: LoadedModel, name: str) -> Job:
    """Of POST /v1/chat/completions. Raises ApiError, ChatTemplateError."""
    _check_format(body)
    _check_room(body.n, model, "n")
    messages = [message.for_template() for message in body.messages]
    parts = render_chat(model.tokenizer, messages, body.add_generation_prompt, body.chat_template_kwargs)
    prompt = Prompt(tuple(model.tokenizer.encode_parts(parts)))
    choices = [Choice(j, prompt, model.tokenizer, body.stops) for j in range(body.n)]
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    answer = ChatAnswer(
        model=name,
        choices=choices,
        num_prompt_tokens=len(prompt.ids),
        tokenizer=model.tokenizer,
        num_top=num_top,
        include_usage=body.include_usage,
        ignored_fields=body.ignored_fields(),
    )
    limit = body.max_completion_tokens or body.max_tokens or _room(prompt, model)
    return Job([_request(answer, choice, body, limit, num_top) for choice in choices], choices, answer)


def tokenize(body: TokenizeBody, tokenizer: Tokenizer) -> list[int]:
    """Of POST /tokenize. Raises ChatTemplateError."""
    if body.messages is None:
        return tokenizer.encode(body.prompt or "", add_special=body.add_special_tokens)
    messages = [message.for_template() for message in body.messages]
    parts = render_chat(tokenizer, messages, body.add_generation_prompt, body.chat_template_kwargs)
    return tokenizer.encode_parts(parts)


def _check_format(body: GenerationBody) -> None:
    """Whether the schema can be held, before anything is queued. Raises ApiError."""
    if body.json_schema is None:
        return
    try:
        check_schema(body.json_schema)
    except SchemaError as error:
        raise invalid_parameter(f"response_format: {error}", "response_format") from None


def _check_room(num_choices: int, model: LoadedModel, param: str) -> None:
    """More than ever run and wait at once would be refused for ever, whatever a client waits. Raises ApiError."""
    capacity = model.engine.capacity
    if num_choices > capacity:
        message = f"This request wants {num_choices} choices; this server runs and queues {capacity} at most."
        raise invalid_parameter(message, param)


def _prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], add_special: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(tuple(tokenizer.encode(prompt, add_special=add_special)), prompt)
    return Prompt(tuple(prompt))


def _room(prompt: Prompt, model: LoadedModel) -> int:
    """Tokens up to the context's end; 1 when there is none left, so that the engine says what is too long."""
    return max(1, model.max_model_len - len(prompt.ids))


def _completion_tokens(body: CompletionBody, choice: Choice, model: LoadedModel) -> int:
    if body.max_tokens is not None:
        return body.max_tokens
    return min(DEFAULT_MAX_TOKENS, _room(choice.prompt, model))


def _request(
    answer: Answer,
    choice: Choice,
    body: GenerationBody,
    max_tokens: int,
    num_logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens,
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=_seed(body, choice.index),
        **_shared_params(body),
    )
    return Request(f"{answer.id}-{choice.index}", choice.prompt.ids, params, group=answer.id)


def _seed(body: GenerationBody, index: int) -> int | None:
    """Another seed for each of the n choices of a prompt, the same for every prompt, within int64."""
    if body.seed is None:
        return None
    return (body.seed + index % body.n + _INT64) % (2 * _INT64) - _INT64


def _shared_params(body: GenerationBody) -> dict[str, Any]:
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": max(0, body.top_k),
        "min_p": body.min_p,
        "ignore_eos": body.ignore_eos,
        "stop_token_ids": frozenset(body.stop_token_ids),
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "json_schema": body.json_schema,
        "logit_bias": {int(token_id): bias for token_id, bias in body.logit_bias.items()},
    }
