"""Schemas as masks of tokens: against a slow reference over finite languages, at random, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from runtime.constraint import ConstraintCompiler
from runtime.request import SamplingParams
from runtime.sampler import Sampler
from runtime.schema_grammar import SchemaError, check_schema
from tests.fake_engine import byte_tokenizer

VOCAB = 264  # more rows than tokens, as models pad their output
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_ids[0]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["é", 'q"', "z"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(TOKENIZER, VOCAB, TOKENIZER.eos_ids)


def reference(language: list[bytes], text: bytes) -> set[int]:
    """The tokens after which `text` is still the beginning of a word; the end token where it is one."""
    words = {i: TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size) if i not in TOKENIZER.special_ids}
    allowed = {i for i, word in words.items() if any(w.startswith(text + word) for w in language)}
    return allowed | ({EOS} if text in language else set())


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"enum": ["a", "ab", "é", 'say "x"', 12, None, [1, {"k": True}]]}, None),
        ({"type": "integer", "minimum": 7, "maximum": 23}, list(range(7, 24))),
        (
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False},
            [{}, {"a": True}, {"a": False}],
        ),
    ],
)
def test_masks_are_those_of_a_search_in_the_language(
    compiler: ConstraintCompiler, schema: dict[str, Any], values: list[Any] | None
) -> None:
    language = [json.dumps(v, ensure_ascii=False).encode() for v in values or schema["enum"]]
    for word in language:
        constraint = compiler.compile(json.dumps(schema))
        for i in range(len(word) + 1):
            assert set(constraint.allowed().nonzero()[:, 0].tolist()) == reference(language, word[:i]), word[:i]
            if i < len(word):
                constraint.advance(byte_id(word[i]))


def byte_id(byte: int) -> int:
    return next(i for i in range(256) if TOKENIZER.token_bytes(i) == bytes([byte]))


def generate(compiler: ConstraintCompiler, schema: Any, seed: int, **params: Any) -> list[int]:
    """Tokens up to the end token, of logits that know nothing."""
    options = SamplingParams(seed=seed, json_schema=json.dumps(schema), **params)
    sampler = Sampler(options, (0,), VOCAB, compiler)
    noise = torch.Generator().manual_seed(seed)
    out: list[int] = []
    while not out or out[-1] != EOS:
        out.append(sampler.sample(4 * torch.randn(VOCAB, generator=noise))[0])
        assert len(out) < 500
    return out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_parses_and_fits(compiler: ConstraintCompiler, temperature: float) -> None:
    texts = set()
    for seed in range(20):
        text = TOKENIZER.decode(generate(compiler, PERSON, seed, temperature=temperature))
        value = json.loads(text)
        assert list(value) == ["name", "age", "tags"], text
        assert len(value["name"]) <= 6 and 0 <= value["age"] <= 120 and type(value["age"]) is int
        assert 1 <= len(value["tags"]) <= 2 and set(value["tags"]) <= {"é", 'q"', "z"}
        texts.add(text)
    assert len(texts) > 10


def test_a_seed_repeats_and_bias_cannot_break_the_schema(compiler: ConstraintCompiler) -> None:
    params = {"logit_bias": {EOS: 100.0, 65: 100.0}, "top_p": 0.5, "repetition_penalty": 1.2}
    first = generate(compiler, PERSON, 3, **params)
    assert generate(compiler, PERSON, 3, **params) == first
    json.loads(TOKENIZER.decode(first))


def test_logprobs_stay_those_of_the_model(compiler: ConstraintCompiler) -> None:
    options = SamplingParams(seed=1, json_schema=json.dumps(PERSON), num_logprobs=0)
    logits = torch.randn(VOCAB)
    token_id, logprob = Sampler(options, (0,), VOCAB, compiler).sample(logits)
    assert TOKENIZER.token_bytes(token_id) == b"{" and logprob is not None
    assert logprob.logprob == pytest.approx(float(logits.log_softmax(0)[token_id]), abs=1e-5)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objct"}, "objct"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "object", "not": {"type": "object"}}, "not"),
        ({"enum": []}, "empty"),
        ([], "object"),
    ],
)
def test_what_cannot_be_held_is_refused(compiler: ConstraintCompiler, schema: Any, reason: str) -> None:
    text = json.dumps(schema)
    with pytest.raises(SchemaError, match=reason) as error:
        check_schema(text)
    assert "\n" not in str(error.value)
    with pytest.raises(SchemaError):
        compiler.compile(text)


def test_a_token_that_was_not_allowed_is_an_error(compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(json.dumps(PERSON))
    with pytest.raises(SchemaError, match="held"):
        constraint.advance(byte_id(ord("x")))


def test_a_model_without_an_end_token_cannot() -> None:
    with pytest.raises(SchemaError, match="end token"):
        ConstraintCompiler(TOKENIZER, VOCAB, ()).compile("{}")
