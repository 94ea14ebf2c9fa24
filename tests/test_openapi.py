"""/openapi.json against what the server does. benchmarks/fuzz_api.py does the same at length, with schemathesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live_server import LiveServer, live_server

KEY = {"authorization": "Bearer k"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(api_keys=frozenset({"k"}), max_body_bytes=4000) as live:
        yield live


@pytest.fixture(scope="module")
def spec(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", headers=KEY).json()
    return found


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value fits a schema of the few words that server/openapi.py uses."""
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float}
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not (value is None and "null" in wanted):
        if not any(isinstance(value, kinds[kind]) for kind in wanted if kind != "null"):
            return False
        if isinstance(value, dict):
            named = schema.get("properties", {})
            inside = all(fits(value[k], part) for k, part in named.items() if k in value)
            return inside and set(schema.get("required", [])) <= set(value)
        if isinstance(value, list):
            return all(fits(item, schema.get("items", {})) for item in value)
    return value == schema.get("const", value) and value in schema.get("enum", [value])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", COMPLETIONS, {"prompt": "a", "logprobs": 1, "echo": True}, 200),
        ("POST", COMPLETIONS, {"prompt": 1}, 400),
        ("POST", COMPLETIONS, {"prompt": "a", "model": "other"}, 404),
        ("POST", COMPLETIONS, {"prompt": "a" * 5000}, 413),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True}, 200),
        ("POST", CHAT, {"messages": []}, 400),
        ("POST", "/tokenize", {"prompt": "a"}, 200),
        ("POST", "/detokenize", {"tokens": [70]}, 200),
        ("POST", "/detokenize", {"tokens": [7000]}, 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/other", None, 404),
        *(("GET", path, None, 200) for path in ("/health", "/ready", "/version", "/cache", "/tokenizer_info")),
    ],
)
def test_answers_are_as_declared(
    server: LiveServer, spec: dict[str, Any], method: str, path: str, body: Any, status: int
) -> None:
    response = httpx.request(method, server.url + path, json=body, headers=KEY)
    assert response.status_code == status, response.text
    declared = spec["paths"]["/v1/models/{name}" if path.startswith("/v1/models/") else path][method.lower()]
    schema = declared["responses"][str(status)]["content"]["application/json"]["schema"]
    assert fits(response.json(), schema), json.dumps(response.json())
    assert not fits({}, schema)


def test_everything_is_declared(spec: dict[str, Any]) -> None:
    assert "422" not in json.dumps(spec) and "HTTPValidationError" not in json.dumps(spec)
    assert spec["components"]["securitySchemes"] and spec["security"]
    for path in (COMPLETIONS, CHAT):
        operation = spec["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", "400", "401", "404", "413", "429", "500", "503"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "retry-after" in operation["responses"]["429"]["headers"]
