"""The endpoints over a real socket: OpenAI's own client, errors, both dialects, readiness, keys, limits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from runtime.request import FinishReason, Request, SamplingParams
from runtime.tokenizer import Part
from server.async_engine import LoadedModel
from server.chat import ChatTemplateError, render_chat
from server.errors import invalid_parameter, unsupported_parameter
from tests.fake_engine import EOS, FakeEngine, byte_tokenizer
from tests.live_server import INFO, MODEL, LiveServer, live_server

HELLO = "Hello, world"
USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body)


def complete(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = post(server, "/v1/completions", **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    return error


# --- OpenAI's client ---


def test_openai_client_completes_and_chats(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=5)
    assert (completion.object, completion.choices[0].text) == ("text_completion", "Hello")
    assert completion.choices[0].finish_reason == "length" and completion.id.startswith("cmpl-")
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        2,
        5,
        7,
    )
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert (chat.object, chat.choices[0].message.content) == ("chat.completion", HELLO)
    assert chat.choices[0].finish_reason == "stop" and chat.choices[0].message.role == "assistant"
    assert chat.usage is not None and chat.usage.completion_tokens == len(HELLO) + 1  # the end token counts


def test_openai_client_streams_the_same_text_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == HELLO
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"] and chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(HELLO) + 1
    assert all(c.usage is None for c in chunks[:-1])


def test_openai_async_client_streams(server: LiveServer) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.completions.create(model=MODEL, prompt="hi", max_tokens=50, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(run()) == HELLO


def test_openai_client_gets_its_error_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="hi")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="hi", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="x" * 300)
    assert long.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 256 tokens. However, " in long.value.message


def test_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL).model_dump()
    assert (card["owned_by"], card["max_model_len"]) == ("coldstream", 256)
    assert (card["coldstream"]["prefill"], card["coldstream"]["scoring"]) == ("dense", "sparse")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


# --- what completions do ---


@pytest.mark.parametrize(
    ("prompt", "num_prompt_tokens"),
    [("hi", 2), (["hi", "you"], 5), ([72, 73], 2), ([[72, 73], [74]], 3), (["one"], 3)],
)
def test_prompts_come_in_four_forms_and_choices_are_prompt_major(
    server: LiveServer, prompt: Any, num_prompt_tokens: int
) -> None:
    before = len(server.engine.requests)
    answer = complete(server, prompt=prompt, n=2, max_tokens=3, seed=7)
    prompts = len(prompt) if isinstance(prompt[0], str | list) and isinstance(prompt, list) else 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * prompts))
    assert answer["usage"]["prompt_tokens"] == num_prompt_tokens
    assert answer["usage"]["completion_tokens"] == 2 * prompts * 3
    sent = server.engine.requests[before:]
    assert [request.params.seed for request in sent] == [7, 8] * prompts
    assert [sent[i].prompt_ids == sent[i + 1].prompt_ids for i in range(0, len(sent), 2)] == [True] * prompts


def test_choices_of_several_prompts_do_not_mix() -> None:
    engine = FakeEngine(byte_tokenizer(), scripts={"a": "first", "b": "second"})
    with live_server(engine) as server:
        answer = complete(server, prompt=["a", "b"], n=2, max_tokens=20)
    assert [choice["text"] for choice in answer["choices"]] == ["first", "first", "second", "second"]


def test_default_max_tokens_is_16_and_shrinks_at_the_end_of_the_context(server: LiveServer) -> None:
    complete(server, prompt="hi")
    assert server.engine.requests[-1].params.max_tokens == 16
    complete(server, prompt="x" * 250)
    assert server.engine.requests[-1].params.max_tokens == 6


def test_chat_without_max_tokens_goes_to_the_end_of_the_context(server: LiveServer) -> None:
    post(server, "/v1/chat/completions", messages=USER)
    request = server.engine.requests[-1]
    assert request.params.max_tokens == 256 - len(request.prompt_ids)
    post(server, "/v1/chat/completions", messages=USER, max_completion_tokens=3, max_tokens=9)
    assert server.engine.requests[-1].params.max_tokens == 3


def test_sampling_fields_reach_the_engine(server: LiveServer) -> None:
    complete(
        server,
        prompt="hi",
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        logit_bias={"65": -100, "7": 2.5},
        presence_penalty=1,
        frequency_penalty=-2,
        repetition_penalty=1.5,
        ignore_eos=True,
        stop_token_ids=[3],
        seed=-1,
        max_tokens=2,
    )
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0, 0.5, 0, 0.1, -1)
    assert params.logit_bias == {65: -100, 7: 2.5} and params.stop_token_ids == {3} and params.ignore_eos
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -2, 1.5)


def test_response_format_reaches_the_engine_as_a_schema(server: LiveServer) -> None:
    person = {"type": "object", "properties": {"name": {"type": "string"}}}
    for given, expected in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (schema_format(person), person),
        (schema_format(person) | {"x": 1}, person),
    ):
        answer = post(server, "/v1/chat/completions", messages=USER, response_format=given, max_tokens=2).json()
        sent = server.engine.requests[-1].params.json_schema
        assert (None if sent is None else json.loads(sent)) == expected
        assert answer["coldstream"]["ignored_fields"] == (["response_format.x"] if "x" in given else [])


def test_fields_that_are_null_count_as_left_out(server: LiveServer) -> None:
    answer = complete(server, prompt="hi", temperature=None, stop=None, n=None, tools=None, max_tokens=None, user=None)
    assert answer["coldstream"]["ignored_fields"] == []
    assert server.engine.requests[-1].params.temperature == 1.0


def test_unknown_fields_are_named_in_the_answer(server: LiveServer) -> None:
    answer = complete(server, prompt="hi", user="me", zzz=1, metadata={})
    assert answer["coldstream"]["ignored_fields"] == ["metadata", "user", "zzz"]
    messages = [{"role": "user", "content": "hi", "mood": "good"}]
    chat = post(server, "/v1/chat/completions", messages=messages, max_tokens=2).json()
    assert chat["coldstream"]["ignored_fields"] == ["messages.mood"]


def test_answer_says_what_it_cost(server: LiveServer) -> None:
    cost = complete(server, prompt="hi", n=2)["coldstream"]
    assert cost["bytes_read"] == {"disk": 8192}
    assert (cost["cache_lookups"], cost["cache_hits"], cost["stall_s"]) == (20, 14, 1.0)
    assert (cost["prefill_s"], cost["decode_s"]) == (0.5, 2.0)


@pytest.mark.parametrize("stop", ["lo,", ["zzz", "lo, w", "lo,"], ["o"]])
def test_stop_strings_span_tokens_and_are_not_in_the_text(server: LiveServer, stop: Any) -> None:
    answer = complete(server, prompt="hi", stop=stop, max_tokens=100, ignore_eos=True)
    first = "Hell" if stop == ["o"] else "Hel"
    assert answer["choices"][0]["text"] == first and answer["choices"][0]["finish_reason"] == "stop"


def test_stop_string_ends_the_request_in_the_engine_as_a_success() -> None:
    engine = FakeEngine(byte_tokenizer(), gate=threading.Semaphore(len("Hello,")))
    with live_server(engine) as server:  # answers at all only because the engine hears of the stop string
        answer = complete(server, prompt="hi", stop="lo,", max_tokens=100)
    assert answer["choices"][0]["text"] == "Hel" and answer["usage"]["completion_tokens"] == len("Hello,")
    assert [reason for _, reason in engine.aborts] == [FinishReason.STOP]
    assert engine.success["stop"] == 1 and engine.failure["cancelled"] == 0


def test_stop_that_never_completes_is_given_out_at_the_end(server: LiveServer) -> None:
    assert complete(server, prompt="hi", stop="world!", max_tokens=50)["choices"][0]["text"] == HELLO


def test_echo_and_logprobs_of_completions(server: LiveServer) -> None:
    choice = complete(server, prompt="abc", echo=True, logprobs=2, max_tokens=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "abcHe" == "".join(logprobs["tokens"])
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    ids = byte_tokenizer().encode("abcHe", add_special=False)
    assert logprobs["token_logprobs"][1:] == [-i / 100 for i in ids[1:]]
    assert len(logprobs["top_logprobs"][1]) == 3  # the likeliest two, and the token itself
    assert logprobs["top_logprobs"][1]["b"] == -ids[1] / 100


def test_echo_with_max_tokens_0_scores_a_prompt_of_token_ids(server: LiveServer) -> None:
    choice = complete(server, prompt=[[72, 73, 74]], echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert choice["text"] == byte_tokenizer().decode([72, 73, 74]) and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.73, -0.74]
    plain = complete(server, prompt="abc", echo=True, max_tokens=0)["choices"][0]
    assert (plain["text"], plain["logprobs"]) == ("abc", None)


def test_logprobs_of_completions_have_the_end_token_too() -> None:
    """lm-eval leaves out the last entry, as the one made token: without it a token of the prompt would go."""
    with live_server(FakeEngine(byte_tokenizer(), script="")) as server:
        answer = complete(server, prompt="abc", echo=True, logprobs=1, max_tokens=1)
        choice = answer["choices"][0]
        assert choice["text"] == "abc" and choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", "</s>"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3] and answer["usage"]["completion_tokens"] == 1
        assert choice["logprobs"]["token_logprobs"][-1] == -2.57


def test_logprobs_keep_to_the_text_that_a_stop_string_leaves(server: LiveServer) -> None:
    choice = complete(server, prompt="hi", logprobs=0, stop="lo", max_tokens=50)["choices"][0]
    assert choice["logprobs"]["tokens"] == ["H", "e", "l"] and choice["text"] == "Hel"


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=3, max_tokens=2
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    first = chat.choices[0].logprobs.content[0]
    assert (first.token, first.bytes, len(first.top_logprobs)) == ("H", [72], 3)


def test_token_that_is_no_character_is_spelt_in_bytes() -> None:
    with live_server(FakeEngine(byte_tokenizer(), script="é")) as server:
        choice = complete(server, prompt="hi", logprobs=0, max_tokens=2)["choices"][0]
    assert choice["text"] == "é" and choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


def test_prompt_that_ends_within_a_character_goes_on_in_the_completion() -> None:
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("é", add_special=False)
    engine = FakeEngine(tokenizer)
    engine._script_ids = lambda request: [second, *tokenizer.eos_ids]  # type: ignore[method-assign]
    with live_server(engine) as server:
        assert complete(server, prompt=[first])["choices"][0]["text"] == "é"


def test_half_a_surrogate_pair_is_survived(server: LiveServer) -> None:
    refused(httpx.post(server.url + "/v1/completions", content=b'{"prompt": "a", "\\udc00": 1}', headers=JSON), 400)
    body = b'{"prompt": "a\\ud800", "echo": true, "max_tokens": 1}'
    response = httpx.post(server.url + "/v1/completions", content=body, headers=JSON)
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == "a\ud800H"


# --- chat templates ---


def test_chat_is_rendered_by_the_models_template(server: LiveServer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
    ]
    assert post(server, "/v1/chat/completions", messages=messages, max_tokens=1).status_code == 200
    ids = server.engine.requests[-1].prompt_ids
    text = byte_tokenizer().decode(ids, skip_special=False)
    assert text == "<s>[system]be brief\n[user]one\ntwo\n[assistant]\n[assistant]"
    assert ids[0] == 256 and ids.count(256) == 1


def test_template_that_refuses_is_a_bad_request(server: LiveServer) -> None:
    messages = [*USER, {"role": "system", "content": "late"}]
    error = refused(post(server, "/v1/chat/completions", messages=messages), 400)
    assert "the system message must come first" in error["message"]


def test_model_without_template_says_so() -> None:
    with live_server(FakeEngine(byte_tokenizer(template=None))) as server:
        assert "no chat template" in refused(post(server, "/v1/chat/completions", messages=USER), 400)["message"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% if %}",
        "{{ messages[7].content.x }}",
        "{{ 1 // 0 }}",
    ],
)
def test_template_that_is_hostile_or_broken_is_refused(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(byte_tokenizer(template), USER)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if loop.last %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages[0]['content'] | trim }}{{ bos_token }}{% if tools %}no{% endif %}",
        "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_templates_render_as_in_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": " <é> \n"}, {"role": "assistant", "content": '"b"'}]
    (expected, *_), _ = render_jinja_template([messages], chat_template=template, bos_token="<s>", eos_token=EOS)
    assert render_chat(byte_tokenizer(template), messages, add_generation_prompt=False) == [Part(expected)]


# --- refusals ---


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": 1}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a", [1]]}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ("/v1/completions", {"prompt": "", "n": 1}, None),
        ("/v1/completions", {"prompt": "a", "n": 0}, "n"),
        ("/v1/completions", {"prompt": "a", "n": "1"}, "n"),
        ("/v1/completions", {"prompt": "a", "n": True}, "n"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "top_p": 0}, "top_p"),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ("/v1/completions", {"prompt": "a", "stop": ""}, "stop"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 2.5}, "presence_penalty"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "seed": 2**63}, "seed"),
        ("/v1/completions", {"prompt": "a", "best_of": 4}, "best_of"),
        ("/v1/completions", {"prompt": "a", "suffix": "x"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages"),
        ("/v1/chat/completions", {"messages": USER, "tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {"messages": USER, "audio": {}}, "audio"),
        ("/v1/chat/completions", {"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
        ("/v1/chat/completions", {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
        (
            "/v1/chat/completions",
            {"messages": USER, "response_format": schema_format({"type": "x"})},
            "response_format",
        ),
        ("/v1/completions", {"prompt": "a", "response_format": schema_format({"not": {}})}, "response_format"),
        ("/v1/completions", {"prompt": "a", "response_format": schema_format({}), "ignore_eos": True}, "ignore_eos"),
        ("/v1/chat/completions", {"messages": USER, "echo": True}, "echo"),
        ("/v1/chat/completions", {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 0}, "max_tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
    ],
)
def test_bad_parameters_are_refused_by_name(
    server: LiveServer, path: str, body: dict[str, Any], param: str | None
) -> None:
    error = refused(httpx.post(server.url + path, json=body), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_parts_that_are_no_text_are_refused(server: LiveServer) -> None:
    content = [{"type": "image_url", "image_url": {"url": "x"}}]
    error = refused(post(server, "/v1/chat/completions", messages=[{"role": "user", "content": content}]), 400)
    assert "image_url" in error["message"]


@pytest.mark.parametrize("name", ["tools", "response_format", "service_tier", "store", "modalities", "tool_choice"])
def test_known_fields_that_ask_for_nothing_pass(server: LiveServer, name: str) -> None:
    neutral = {
        "tools": [],
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "modalities": ["text"],
        "tool_choice": "none",
    }
    response = post(server, "/v1/chat/completions", messages=USER, max_tokens=1, **{name: neutral[name]})
    assert response.status_code == 200 and response.json()["coldstream"]["ignored_fields"] == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 50_000, b'{"prompt": 1' + b"0" * 5000 + b"}"]
)
def test_bodies_that_are_no_json_object_are_bad_requests(server: LiveServer, body: bytes) -> None:
    refused(httpx.post(server.url + "/v1/completions", content=body, headers=JSON), 400)


def test_unknown_paths_and_methods(server: LiveServer) -> None:
    assert refused(httpx.get(server.url + "/v1/nothing"), 404)["code"] == "not_found"
    response = httpx.get(server.url + "/v1/completions")
    assert refused(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"


def test_body_that_is_too_large_is_refused_with_and_without_a_length() -> None:
    with live_server(max_body_bytes=1000) as server:
        big = json.dumps({"prompt": "x" * 2000}).encode()
        refused(httpx.post(server.url + "/v1/completions", content=big, headers=JSON), 413)
        refused(httpx.post(server.url + "/v1/completions", content=iter([big[:900], big[900:]]), headers=JSON), 413)
        assert complete(server, prompt="hi")["choices"][0]["text"] == HELLO


def test_full_queue_is_429_with_retry_after_and_leaves_nothing_behind() -> None:
    gate = threading.Semaphore(0)
    with live_server(FakeEngine(byte_tokenizer(), max_live=2, gate=gate)) as server:
        server.engine.submit(Request("other", (1,), SamplingParams()), lambda event: None)
        response = post(server, "/v1/completions", prompt="hi", n=2)
        assert refused(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "1"
        streamed = post(server, "/v1/completions", prompt="hi", n=2, stream=True)
        assert streamed.status_code == 429  # known before the answer begins
        server.engine.abort("other")
        gate.release(len(HELLO))
        server.engine.join()
        assert server.engine.num_live == 0


def test_more_choices_than_ever_fit_are_400_and_name_the_field() -> None:
    with live_server(FakeEngine(byte_tokenizer(), max_live=2)) as server:
        error = refused(post(server, "/v1/completions", prompt="hi", n=3), 400)
        assert error["param"] == "n" and "3 choices" in error["message"] and "2 at most" in error["message"]
        assert refused(post(server, "/v1/completions", prompt=["a", "b", "c"]), 400)["param"] == "prompt"
        messages = [{"role": "user", "content": "hi"}]
        assert refused(post(server, "/v1/chat/completions", messages=messages, n=3), 400)["param"] == "n"
        assert server.engine.requests == []
        assert len(complete(server, prompt="hi", n=2)["choices"]) == 2


def test_failure_that_nobody_foresaw_is_500_under_the_requests_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    with live_server() as server:
        monkeypatch.setattr(server.engine, "submit", explode)
        response = httpx.post(
            server.url + "/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "mine"}, timeout=30
        )
        assert response.status_code == 500 and response.headers["x-request-id"] == "mine"
        assert response.json()["error"]["type"] == "server_error" and "boom" not in response.text
        assert 'request_failure_total{reason="internal"} 1.0' in httpx.get(server.url + "/metrics").text


def test_failed_read_is_500_for_that_request_only() -> None:
    with live_server(FakeEngine(byte_tokenizer(), fail_after=2)) as server:
        error = refused(post(server, "/v1/completions", prompt="hi"), 500)
        assert error["type"] == "server_error" and "failed: EIO" in error["message"]
        server.engine.fail_after = None
        assert complete(server, prompt="hi")["choices"][0]["text"] == HELLO


# --- keys, readiness, ids ---


def test_keys_guard_everything_but_the_probes() -> None:
    with live_server(api_keys=frozenset({"secret", "other"})) as server:
        for path in ("/v1/models", "/metrics", "/version", "/nothing"):
            assert refused(httpx.get(server.url + path), 401)["code"] == "invalid_api_key"
        for key in ("wrong", "x", "secre", "secret2", "schlüssel"):
            header = {b"authorization": f"Bearer {key}".encode()}
            assert httpx.get(server.url + "/v1/models", headers=header).status_code == 401
        for key in ("secret", "other"):
            assert httpx.get(server.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/ready").status_code == 200
        with (
            pytest.raises(openai.AuthenticationError),
            openai.OpenAI(base_url=server.url + "/v1", api_key="no") as client,
        ):
            client.models.list()


def test_loading_ready_draining() -> None:
    with live_server(loaded=False) as server:
        server.front.readiness.progress("warming", 0.25)
        health = httpx.get(server.url + "/health").json()
        assert (health["state"], health["stage"], health["share"]) == ("loading", "warming", 0.25)
        response = post(server, "/v1/completions", prompt="hi")
        assert "warming, 25%" in refused(response, 503)["message"] and response.headers["retry-after"] == "5"
        assert refused(httpx.get(server.url + "/ready"), 503)["code"] == "not_ready"
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == MODEL
        server.front.attach(LoadedModel(server.engine, server.engine.tokenizer, 256, INFO))
        assert httpx.get(server.url + "/ready").status_code == 200
        assert httpx.get(server.url + "/health").json()["io_engine"] == "pread+direct"
        assert complete(server, prompt="hi")["choices"][0]["text"] == HELLO
        server.front.drain()
        assert "shutting down" in refused(post(server, "/v1/completions", prompt="hi"), 503)["message"]
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/health").json()["state"] == "draining"


def test_drain_while_loading_is_not_undone() -> None:
    with live_server(loaded=False) as server:
        server.front.drain()
        server.front.attach(LoadedModel(server.engine, server.engine.tokenizer, 256, INFO))
        assert httpx.get(server.url + "/ready").status_code == 503


def test_request_id_is_echoed_or_made(server: LiveServer) -> None:
    own = httpx.get(server.url + "/health", headers={"x-request-id": "abc-1"})
    assert own.headers["x-request-id"] == "abc-1"
    assert len(httpx.get(server.url + "/nothing").headers["x-request-id"]) == 32
    assert len(httpx.get(server.url + "/health", headers={"x-request-id": "x" * 200}).headers["x-request-id"]) == 32


def test_tokenize_and_detokenize(server: LiveServer) -> None:
    answer = post(server, "/tokenize", prompt="né").json()
    assert (answer["count"], answer["max_model_len"]) == (3, 256)
    assert post(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": "né"}
    chat = post(server, "/tokenize", messages=USER).json()
    assert post(server, "/detokenize", tokens=chat["tokens"]).json()["prompt"] == "<s>[user]hi\n[assistant]"
    info = httpx.get(server.url + "/tokenizer_info").json()
    assert (info["vocab_size"], info["eos_token"], info["eos_token_ids"]) == (258, EOS, [257])


def test_version(server: LiveServer) -> None:
    assert httpx.get(server.url + "/version").json() == {"version": "1.2.3"}


def test_refusals_name_what_they_refuse() -> None:
    assert unsupported_parameter("tools").body()["error"]["param"] == "tools"
    assert invalid_parameter("No.").body() == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}
    }
