"""A JSON schema as a grammar of llguidance, and what cannot be one. Knows neither tokens nor PyTorch.

JSON is written on one line with `, ` and `: `, as json.dumps does it, so that a model cannot spend its tokens on
blanks. Keywords that the library does not hold are refused, not skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits

from cache.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_LEXER_STATES = 20_000  # about 2 KB each: a hostile pattern must not eat the memory budget
_MAX_REASON = 200  # characters of the library's complaint that are passed on


class SchemaError(RequestError):
    """A JSON schema that cannot be held: not valid, not satisfiable, or with keywords that are not implemented."""


def check_schema(schema: str) -> None:
    """Refuses what cannot become a constraint; takes milliseconds. Raises SchemaError."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar(schema), limits=limits())
    if failed:
        raise SchemaError(f"The JSON schema cannot be used: {reason(messages[0])}")


def grammar(schema: str) -> str:
    """The grammar of a schema, given as JSON text. Raises SchemaError for text that is no JSON object."""
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
    except ValueError as error:
        raise SchemaError(f"The JSON schema cannot be used: {reason(str(error))}") from None


def limits() -> LLParserLimits:
    """How much work and memory one answer's automaton may take."""
    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def reason(message: str) -> str:
    """The complaint as one line that ends like a sentence."""
    line = " ".join(message.split())[:_MAX_REASON]
    return line if line.endswith(".") else f"{line}."
